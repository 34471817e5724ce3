"""What the shipped objectives say of models whose answer is known."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moenas.data.corpus import Corpus
from moenas.evaluate.latency import device_lock
from moenas.evaluate.subject import Subject, Training
from moenas.model.architecture import Architecture
from moenas.resources import listing
from moenas.space.objective import shipped_objective
from moenas.space.sections import Protocol, Recipe

MIXER = {"kind": "attention", "head_dim": 16}
MOE = {"kind": "moe", "n_experts": 4, "d_expert": 32, "router": {"top_k": 2}}
DENSE = {"kind": "dense", "d_ff": 64, "activation": "gelu"}
NAMES = {
    "active_params": ("cost", "parameters"),
    "dead_experts": ("training", "experts"),
    "decode_ms": ("training", "ms/step"),
    "dropped_share": ("training", ""),
    "flops_per_token": ("model", "FLOP/token"),
    "load_imbalance": ("training", ""),
    "peak_memory": ("model", "MiB"),
    "prefill_ms": ("training", "ms"),
    "routing_entropy": ("training", ""),
    "total_params": ("cost", "parameters"),
    "val_loss": ("training", "nats/token"),
}


def architecture(*ffns: dict[str, Any]) -> Architecture:
    blocks = [{"mixer": MIXER, "ffn": ffn} for ffn in ffns]
    return Architecture.parse({"vocab_size": 64, "d_model": 32, "blocks": blocks})


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    """A dense and a sparse layer, built and as if trained."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = architecture(DENSE, MOE)
    recipe = Recipe(tokens=1024, context=16, batch=4, lr=1e-3, dtype="float32")
    tokens = (torch.arange(4000) * 7 % 64).numpy().astype("uint8")
    corpus = Corpus("sevens", tokens, tokens[:500], 64, False, "", [None, None], {})
    protocol = Protocol(decode_batch=2, decode_context=8, min_repeats=3, max_repeats=3)
    device = torch.device("cpu")
    with closing(device_lock(device)) as lease:
        made = Subject(one, one.cost(16), recipe, protocol, corpus, device, 0, lease)
        made.built = one.build()
        routing = [
            {"layer": 1, "max_vio": 0.25, "entropy": 0.9, "dead": 1, "dropped": 0.0},
            {"layer": 3, "max_vio": 0.75, "entropy": 0.7, "dead": 2, "dropped": 0.5},
        ]
        made.trained = Training(2.5, 3.6, 2.4, 1.0, [], routing)
        yield made


def test_every_shipped_file_is_an_objective() -> None:
    shipped = {name: shipped_objective(name) for name in listing("objectives", ".py")}
    assert {n: (o.needs, o.unit) for n, o in shipped.items()} == NAMES
    assert [n for n, o in shipped.items() if o.direction == "maximize"] == ["routing_entropy"]


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_measures(subject: Subject, name: str) -> None:
    assert shipped_objective(name).measure(subject).value > 0


def test_parameters_by_hand(subject: Subject) -> None:
    table, norms = 64 * 32, 5 * 32
    attention, dense, expert, router = 4 * 32 * 32, 2 * 32 * 64, 3 * 32 * 32, 32 * 4
    whole = table + norms + 2 * attention + dense + router
    assert shipped_objective("total_params").measure(subject).value == whole + 4 * expert
    assert shipped_objective("active_params").measure(subject).value == whole + 2 * expert


def test_flops_by_hand(subject: Subject) -> None:
    flops = shipped_objective("flops_per_token").measure(subject)
    products = 64 * 32 + 2 * 4 * 32 * 32 + 2 * 32 * 64 + 2 * 3 * 32 * 32 + 32 * 4
    attention = 2 * 2 * 16 * 32  # two layers, scores and values, over 16 tokens
    assert flops.value == 2 * (products + attention)
    assert flops.details["context"] == 16
    assert flops.details["macs"] == 16 * (products + attention)


def test_load_imbalance_is_the_mean_over_moe_layers(subject: Subject) -> None:
    objective = shipped_objective("load_imbalance")
    assert objective.measure(subject).value == 0.5
    assert objective.measure(subject).details["max_vio"] == {"1": 0.25, "3": 0.75}
    assert subject.trained is not None
    subject.trained = replace(subject.trained, routing=[])
    assert objective.measure(subject).value == 0.0


@pytest.mark.parametrize(
    ("name", "value", "without"),
    [("routing_entropy", 0.8, 1.0), ("dead_experts", 3, 0), ("dropped_share", 0.25, 0.0)],
)
def test_routing_objectives_over_moe_layers(
    subject: Subject, name: str, value: float, without: float
) -> None:
    objective = shipped_objective(name)
    measured = objective.measure(subject)
    assert measured.value == pytest.approx(value)
    (layers,) = measured.details.values()
    assert set(layers) == {"1", "3"}
    assert subject.trained is not None
    subject.trained = replace(subject.trained, routing=[])
    assert objective.measure(subject).value == without


def test_peak_memory_repeats_and_grows_by_what_is_added(subject: Subject) -> None:
    objective = shipped_objective("peak_memory")
    small = objective.measure(subject)
    assert objective.measure(subject) == small
    assert small.value * 2**20 == small.details["bytes"]
    # Weights, their gradients and two moments at least, four bytes each.
    assert small.details["bytes"] > 16 * subject.cost.params
    subject.recipe = replace(subject.recipe, batch=8)
    more = objective.measure(subject).details["bytes"] - small.details["bytes"]
    logits = 4 * 4 * 16 * 64  # float32, of 4 more sequences
    assert more > logits
    # An idle expert costs weights, gradients and moments, and nothing for activations.
    subject.recipe = replace(subject.recipe, batch=4)
    wider = architecture(DENSE, MOE | {"n_experts": 8})
    subject.architecture = wider
    grown = objective.measure(subject).details["bytes"] - small.details["bytes"]
    idle = wider.cost(16).params - subject.cost.params
    assert 16 * idle <= grown < 17 * idle
