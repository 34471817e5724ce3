"""The pairs of times, and models timed against the reference."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moenas.evaluate.device_lock import DeviceLock
from moenas.evaluate.devices import device_info, prepare_process
from moenas.evaluate.latency import (
    DEVICE_REFERENCE,
    DEVICE_REFERENCE_VERSION,
    REFERENCE,
    REFERENCE_VERSION,
    Workload,
    _side,
    device_lock,
    inference_copy,
    measure_latency,
    prepare,
)
from moenas.model.architecture import Architecture, Caches
from moenas.records import Plain
from moenas.space.sections import Protocol

CPU = torch.device("cpu")
DECODE = Workload("decode", 2, 16, torch.float32, 1, CPU)
PREFILL = Workload("prefill", 1, 64, torch.float32, 1, CPU)
QUICK = Protocol(min_repeats=5, max_repeats=15, max_seconds=5.0)


def architecture(d_model: int = 32, d_ff: int = 64) -> Architecture:
    mixer = {"kind": "attention", "head_dim": 16}
    dense = {"kind": "dense", "d_ff": d_ff}
    moe = {"kind": "moe", "n_experts": 4, "d_expert": 32, "router": {"balance": "bias"}}
    blocks = [{"repeat": 2, "mixer": mixer, "ffn": dense}, {"mixer": mixer, "ffn": moe}]
    return Architecture.parse({"vocab_size": 50, "d_model": d_model, "blocks": blocks})


# --- models ------------------------------------------------------------------------------------


def tokens_for(workload: Workload, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(vocab_size, workload.tokens, generator=torch.Generator().manual_seed(1))


def test_the_reference_model_changes_only_with_its_version() -> None:
    reference = Architecture.parse(REFERENCE)
    assert (REFERENCE_VERSION, reference.fingerprint) == (1, "28a481163e90ad19")
    on_gpus = Architecture.parse(DEVICE_REFERENCE)
    assert (DEVICE_REFERENCE_VERSION, on_gpus.fingerprint) == (1, "636feb84a90a60d8")


@pytest.mark.parametrize("start_tokens", [1, 7])
def test_each_decoding_step_continues_the_same_cache(start_tokens: int) -> None:
    model = architecture().build().eval()
    tokens = torch.randint(50, (3, start_tokens + 1), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(tokens)[:, -1:]
        step = prepare(model, tokens, "decode")
        for _ in range(3):
            torch.testing.assert_close(step(), expected)
        torch.testing.assert_close(prepare(model, tokens, "prefill")(), model(tokens))


STATES = [
    {"kind": "mamba2", "n_heads": 2, "head_dim": 16, "d_state": 8},
    {"kind": "gated_delta", "n_heads": 2, "key_dim": 16, "value_dim": 16},
    {"kind": "short_conv"},
]


@pytest.mark.parametrize("mixer", STATES, ids=lambda mixer: str(mixer["kind"]))
def test_each_decoding_step_begins_with_the_state_after_the_prompt(mixer: Plain) -> None:
    blocks = [{"mixer": mixer, "ffn": {"kind": "dense", "d_ff": 32}}]
    one = Architecture.parse({"vocab_size": 50, "d_model": 32, "blocks": blocks})
    model, tokens = one.build(seed=1).eval(), tokens_for(DECODE)
    with torch.inference_mode():
        step = prepare(model, tokens, "decode")
        first = step()
        assert torch.equal(step(), first)
        torch.testing.assert_close(first, model(tokens)[:, -1:])


def test_what_a_graph_reads_is_held() -> None:
    """A graph reads caches where they lay; the side of a measurement keeps them there."""
    model = architecture().build().eval()
    with torch.inference_mode():
        side = _side(model, tokens_for(DECODE), DECODE)
    held = [cell.cell_contents for cell in side.held[0].__closure__]  # type: ignore[attr-defined]
    assert any(isinstance(one, Caches) for one in held)
    assert model in side.held


def test_a_deployed_model_computes_the_same_and_routes_in_float32() -> None:
    one = architecture()
    model = one.build(seed=3).eval()
    tokens = tokens_for(PREFILL)
    same = inference_copy(one, model, torch.float32)
    assert torch.equal(same(tokens), model(tokens))
    half = inference_copy(one, model, torch.bfloat16)
    kinds = {name: value.dtype for name, value in half.state_dict().items()}
    assert kinds["blocks.0.ffn.up.weight"] == kinds["blocks.2.ffn.experts.up"] == torch.bfloat16
    assert kinds["embedding"] == torch.bfloat16
    assert kinds["blocks.2.ffn.router.logits.weight"] == kinds["norm.weight"] == torch.float32
    with torch.inference_mode():
        assert torch.equal(half(tokens), model(tokens, dtype=torch.bfloat16))


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceLock]:
    """A lease of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with closing(device_lock(CPU)) as lock:
        yield lock


def test_a_bigger_model_takes_longer_and_the_reference_takes_as_long_as_itself(
    lease: DeviceLock,
) -> None:
    reference = Architecture.parse(REFERENCE)
    bigger = {**REFERENCE, "blocks": REFERENCE["blocks"] * 4}
    times = {}
    for name, one in (("same", reference), ("four times", Architecture.parse(bigger))):
        model = inference_copy(one, one.build(), torch.float32)
        tokens = tokens_for(PREFILL, 256)
        times[name] = measure_latency(model, tokens, PREFILL, QUICK, lease, {})
    assert 0.6 < times["same"].details["ratio"] < 1.6
    assert times["four times"].details["ratio"] > 1.7


def test_the_value_is_the_ratio_times_the_reference_of_the_study(lease: DeviceLock) -> None:
    one = architecture()
    model = inference_copy(one, one.build(), torch.float32)
    tokens, threads, collects = tokens_for(DECODE), torch.get_num_threads(), gc.isenabled()
    latency = measure_latency(model, tokens, DECODE, QUICK, lease, {DECODE.key: 1000.0})
    assert latency.value == latency.details["ratio"] * 1000.0
    assert latency.details["reference_ms"] == 1000.0
    other = measure_latency(model, tokens, DECODE, QUICK, lease, {"another machine": 1000.0})
    assert other.value == other.details["ratio"] * other.details["reference_ms"]
    assert other.details["reference_ms"] < 1000.0
    for details in (latency.details, other.details):
        assert details["reference_key"] == DECODE.key
        assert (details["batch"], details["context"], details["dtype"]) == (2, 16, "float32")
        assert 5 <= details["n"] <= 15
        assert details["noisy"] == (details["spread"] > QUICK.precision)
        assert {"contended", "cpu_ratio", "mad", "wall_ms"} <= details.keys()
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, collects)


def test_the_key_tells_apart_all_that_a_reference_time_depends_on() -> None:
    changes = {"phase": "prefill", "batch": 3, "context": 17, "dtype": torch.bfloat16, "threads": 2}
    keys = [DECODE.key] + [replace(DECODE, **{k: v}).key for k, v in changes.items()]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    info = device_info(CPU, 1, torch.float32)
    assert info["name"] in DECODE.key
    assert torch.__version__ in DECODE.key
    assert (info["key"], info["kind"], info["dtype"]) == ("cpu", "cpu", "float32")


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("phase", "batch", "context"), [("decode", 8, 128), ("prefill", 2, 512)])
def test_a_latency_on_a_gpu_is_the_same_again(
    phase: Any, batch: int, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1 %, from replays of a graph, for a model of a new build each time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    device = torch.device("cuda", 0)
    prepare_process(device)
    workload = Workload(phase, batch, context, torch.bfloat16, 1, device)
    mixer = {"kind": "attention", "head_dim": 64}
    moe = {"kind": "moe", "n_experts": 16, "d_expert": 128}
    blocks = [{"repeat": 4, "mixer": mixer, "ffn": moe}]
    one = Architecture.parse({"vocab_size": 256, "d_model": 256, "blocks": blocks})
    tokens = tokens_for(workload, 256).to(device)
    known: dict[str, float] = {}
    times, precise = [], Protocol(precision=0.003)
    with closing(device_lock(device)) as lease:
        for _ in range(2):
            model = inference_copy(one, one.build(device, 0), workload.dtype)
            measured = measure_latency(model, tokens, workload, precise, lease, known)
            known = {workload.key: measured.details["reference_ms"]}
            assert measured.details["captured"]
            assert measured.details["eager_ms"] > 0
            times.append(measured.value)
    assert times[1] == pytest.approx(times[0], rel=0.01)
