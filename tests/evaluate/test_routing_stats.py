"""What is measured of the routing, against counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moenas.evaluate.routing_stats import (
    MIN_ASSIGNMENTS,
    CollapseDetector,
    RoutingAccumulator,
    RoutingStats,
    routing_health,
)
from moenas.model.architecture import Architecture, Model

NAMES = ("a", "b", "c")


def build(zero: int = 0, **router: Any) -> Model:
    moe = {"kind": "moe", "n_experts": 4, "d_expert": 16, "n_zero_experts": zero, "router": router}
    mixer = {"kind": "attention", "head_dim": 8}
    blocks = [
        {"mixer": mixer, "ffn": moe},
        {"mixer": mixer},
        {"mixer": mixer, "ffn": moe | {"n_experts": 6}},
    ]
    plain = {"vocab_size": 32, "d_model": 16, "blocks": blocks}
    return Architecture.parse(plain).build(seed=0)


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens, and for each of them a domain: its number modulo 2, of three domains."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 32, (3, 10), generator=generator) for _ in range(count)]
    return [(t, t % 2) for t in tokens]


ROUTERS: dict[str, Any] = {
    "top_k": {"top_k": 2},
    "zero experts": {"top_k": 2, "zero": 3},
    "expert choice": {"selection": "expert_choice", "allow_acausal": True},
    "threshold": {"selection": "threshold", "score": "sigmoid"},
    "hash": {"selection": "hash", "score": "uniform", "top_k": 1},
    "capacity": {"top_k": 2, "capacity_factor": 0.5},
}


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
def test_a_meter_counts_slot_by_slot(fields: dict[str, Any]) -> None:
    model = build(**fields).train()
    layers = model.moe_layers()
    meter = RoutingAccumulator(layers, len(NAMES))
    sizes = [moe.balance.n_experts for _, moe in layers]
    loads = [[0] * n for n in sizes]
    tables = [[[0] * n for _ in NAMES] for n in sizes]
    squares: list[list[float]] = [[] for _ in sizes]
    dropped: list[list[float]] = [[] for _ in sizes]
    for tokens, where in batches():
        model(tokens)
        meter.add(where)
        for i, (_, moe) in enumerate(layers):
            choice = moe.routing.choice
            kept = torch.ones_like(choice.experts) if choice.kept is None else choice.kept
            slots = zip(
                choice.slot_tokens().tolist(),
                choice.experts.flatten().tolist(),
                kept.flatten().tolist(),
                strict=True,
            )
            for token, expert, counts in slots:
                loads[i][expert] += int(counts)
                tables[i][int(where.flatten()[token])][expert] += int(counts)
            squares[i] += choice.logits.flatten().tolist()
            dropped[i].append(moe.routing.dropped.item())
    readings = meter.read()
    assert [reading.layer for reading in readings] == [0, 2]
    for i, reading in enumerate(readings):
        assert reading.load.tolist() == loads[i]
        assert reading.domains.tolist() == tables[i]
        rms = math.sqrt(sum(x * x for x in squares[i]) / len(squares[i]))
        assert reading.logit_rms == pytest.approx(rms, rel=1e-5)
        assert reading.logit_max == pytest.approx(max(map(abs, squares[i])), rel=1e-5)
        assert reading.dropped == pytest.approx(sum(dropped[i]) / len(dropped[i]))
    assert any(d > 0 for row in dropped for d in row) is ("capacity_factor" in fields)


def test_a_reading_begins_anew() -> None:
    model = build()
    meter = RoutingAccumulator(model.moe_layers())
    assert meter.read() == []
    sums = []
    for tokens, _ in batches(2):
        model(tokens)
        meter.add()
        sums.append([reading.load.sum().item() for reading in meter.read()])
    assert sums == [[60, 60], [60, 60]]
    assert meter.read() == []


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for the device, or read its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "bincount", "unique"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_adding_makes_the_host_wait_for_nothing() -> None:
    model = build(top_k=2, capacity_factor=1.0).train()
    meter = RoutingAccumulator(model.moe_layers(), 3)
    tokens, where = batches()[0]
    model(tokens)
    with Waits() as waits:
        meter.add(where)
    assert waits.names == []
    with Waits() as waits:
        meter.layers[0][1].routing.dropped.item()
    assert waits.names, "the counter counts"


def test_a_row_has_the_shares_of_each_domain_that_has_slots() -> None:
    load = torch.tensor([30.0, 10.0])
    table = torch.tensor([[6.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    row = RoutingStats(3, load, 0.25, 1.23456789, 4.0, table).row(NAMES)
    assert row["domains"] == {"a": [0.75, 0.25], "c": [0.3333, 0.6667]}
    assert (row["layer"], row["load"], row["dropped"]) == (3, [0.75, 0.25], 0.25)
    short = RoutingStats(3, load, 0.25, 1.23456789, 4.0, table).rounded_row()
    assert short["logit_rms"] == 1.2346
    assert "domains" not in short


# --- collapse ----------------------------------------------------------------------------------


def reading(load: list[int], layer: int = 0) -> RoutingStats:
    return RoutingStats(
        layer, torch.tensor(load).double(), 0.0, 1.0, 1.0, torch.zeros(0, len(load))
    )


def verdicts(watch: CollapseDetector, *loads: list[int]) -> list[tuple[int, float] | None]:
    return [watch.update([reading(load)]) for load in loads]


def test_a_watch_ends_only_above_its_bound() -> None:
    layers = build().moe_layers()
    alive, dead = [500] * 4, [2000, 0, 0, 0]
    assert verdicts(CollapseDetector(layers, 0.75), *[dead] * 8) == [None] * 8
    assert verdicts(CollapseDetector(layers, None), *[dead] * 8) == [None] * 8
    assert verdicts(CollapseDetector(layers, 0.7), *[dead] * 4) == [None, None, None, (0, 0.75)]
    watch = CollapseDetector(layers, 0.7)
    both = [watch.update([reading(alive), reading(dead, 2)]) for _ in range(4)]
    assert both == [None, None, None, (2, 0.75)]


def test_experts_that_take_turns_are_alive() -> None:
    turns = [[2000 if i == j else 0 for i in range(4)] for j in range(4)]
    assert verdicts(CollapseDetector(build().moe_layers(), 0.0), *turns * 3) == [None] * 12


def test_few_slots_wait_for_more_rows() -> None:
    few = [MIN_ASSIGNMENTS // 2, 0, 0, 0]
    watch = CollapseDetector(build().moe_layers(), 0.5)
    assert verdicts(watch, *[few] * 8) == [None] * 7 + [(0, 0.75)]
    assert verdicts(watch, *[few] * 7) == [None] * 7, "judged anew"


def test_a_hash_does_not_collapse() -> None:
    layers = build(selection="hash", score="uniform", top_k=1).moe_layers()
    assert verdicts(CollapseDetector(layers, 0.5), *[[2000, 0, 0, 0]] * 8) == [None] * 8


# --- health ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "max_vio", "cv", "entropy", "dead"),
    [
        ([5, 5, 5, 5], 0.0, 0.0, 1.0, 0),
        ([20, 0, 0, 0], 3.0, math.sqrt(3), 0.0, 3),
        ([10, 10, 0, 0], 1.0, 1.0, 0.5, 2),
        ([1999, 2000, 1, 4000], 1.0, None, None, 1),
        ([7], 0.0, 0.0, 1.0, 0),
        ([0, 0, 0], 0.0, 0.0, 0.0, 3),
    ],
)
def test_routing_health(
    load: list[int], max_vio: float, cv: float | None, entropy: float | None, dead: int
) -> None:
    health = routing_health(torch.tensor(load))
    assert sum(health["load"]) == pytest.approx(1 if sum(load) else 0, abs=1e-5)
    assert health["max_vio"] == pytest.approx(max_vio, abs=1e-9)
    assert health["dead"] == dead
    assert cv is None or health["cv"] == pytest.approx(cv, abs=1e-9)
    assert entropy is None or health["entropy"] == pytest.approx(entropy, abs=1e-9)
