"""The pairs of times, and models timed against the reference."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moenas.architecture import Architecture
from moenas.latency import (
    REFERENCE,
    REFERENCE_VERSION,
    Pairs,
    Workload,
    deployed,
    device_info,
    device_lease,
    measure_latency,
    median_interval,
    prepare,
    time_pairs,
)
from moenas.lease import DeviceLease
from moenas.sections import Protocol

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


# --- pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Ranks of the 95 % interval for a median, as tables of the sign test print them.
    ("n", "low", "high"),
    [(6, 1, 6), (9, 2, 8), (10, 2, 9), (20, 6, 15), (25, 8, 18), (30, 10, 21), (50, 18, 33)],
)
def test_the_interval_of_a_median_is_the_tabled_one(n: int, low: int, high: int) -> None:
    values = list(range(1, n + 1))
    random.Random(n).shuffle(values)
    assert median_interval([float(v) for v in values]) == (low, high)


@pytest.mark.parametrize("n", [6, 11, 24])
def test_the_interval_covers_the_median_as_often_as_it_says(n: int) -> None:
    draw = random.Random(0)
    samples = [[draw.expovariate(1.0) for _ in range(n)] for _ in range(2000)]
    intervals = [median_interval(sample) for sample in samples]
    covered = sum(low <= 0.6931 <= high for low, high in intervals) / len(samples)
    assert 0.94 < covered < 0.995


def test_few_values_give_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([2.0]) == (2.0, 2.0)


class Machine:
    """A clock that runs by what runs on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow = 1.0
        self.log: list[str] = []

    def run(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def step() -> None:
            self.log.append(name)
            self.now += seconds() * self.slow

        return step

    def clock(self) -> float:
        return self.now


def test_the_ratio_does_not_feel_a_machine_that_slows_down() -> None:
    machine = Machine()

    def drift() -> float:
        machine.slow *= 1.0001
        return 0.003

    pairs = time_pairs(
        machine.run("candidate", drift),
        machine.run("reference", lambda: 0.002),
        Protocol(min_repeats=60, max_repeats=60, max_seconds=1e9),
        CPU,
        machine.clock,
    )
    assert len(pairs.candidate) == 60
    assert pairs.candidate[-1] > 1.005 * pairs.candidate[0]
    assert pairs.ratio == pytest.approx(1.5, rel=1e-3)
    assert pairs.spread < 1e-3
    # One untimed run and 10 ms of timed ones a side, the sides in random order.
    assert pairs.runs == 3
    samples = [["candidate"] * 4, ["reference"] * 6]
    log = machine.log[-600:]
    order = [log[i : i + 10] for i in range(0, 600, 10)]
    assert all(pair in (samples[0] + samples[1], samples[1] + samples[0]) for pair in order)
    assert 15 < sum(pair[0] == "candidate" for pair in order) < 45


def test_a_steady_ratio_stops_early_and_a_noisy_one_goes_on() -> None:
    protocol = Protocol(min_repeats=8, max_repeats=40, precision=0.02, max_seconds=1e9)
    draw = random.Random(0)
    for noise, expected in ((0.0, 8), (0.5, 40)):
        machine = Machine()

        def candidate(noise: float = noise) -> float:
            return 0.01 * (1 + noise * draw.random())

        pairs = time_pairs(
            machine.run("c", candidate),
            machine.run("r", lambda: 0.01),
            protocol,
            CPU,
            machine.clock,
        )
        assert len(pairs.candidate) == expected
        assert (pairs.spread > 0.02) == (expected == 40)


def test_a_slow_candidate_is_timed_three_times_at_least() -> None:
    machine = Machine()
    pairs = time_pairs(
        machine.run("c", lambda: 10.0),
        machine.run("r", lambda: 0.01),
        Protocol(min_repeats=8, max_seconds=4.0),
        CPU,
        machine.clock,
    )
    assert pairs.candidate == pytest.approx([10.0] * 3)


def test_contention_is_wall_time_without_cpu_time() -> None:
    alone = Pairs([2.0, 2.0], [1.0, 1.0], [1.9, 1.9], [1.0, 1.0]).contention()
    assert alone["cpu_ratio"] == pytest.approx(1.9)
    assert not alone["contended"]
    shared = Pairs([4.0, 4.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]).contention()
    assert shared["wall_per_cpu"] == pytest.approx(2.0)
    assert shared["contended"]


# --- models ------------------------------------------------------------------------------------


def tokens_for(workload: Workload, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(vocab_size, workload.tokens, generator=torch.Generator().manual_seed(1))


def test_the_reference_model_changes_only_with_its_version() -> None:
    reference = Architecture.parse(REFERENCE)
    assert (REFERENCE_VERSION, reference.fingerprint) == (1, "28a481163e90ad19")


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


def test_a_deployed_model_computes_the_same_and_routes_in_float32() -> None:
    one = architecture()
    model = one.build(seed=3).eval()
    tokens = tokens_for(PREFILL)
    same = deployed(one, model, torch.float32)
    assert torch.equal(same(tokens), model(tokens))
    half = deployed(one, model, torch.bfloat16)
    kinds = {name: value.dtype for name, value in half.state_dict().items()}
    assert kinds["blocks.0.ffn.up.weight"] == kinds["blocks.2.ffn.experts.up"] == torch.bfloat16
    assert kinds["embedding"] == torch.bfloat16
    assert kinds["blocks.2.ffn.router.logits.weight"] == kinds["norm.weight"] == torch.float32
    with torch.inference_mode():
        assert torch.equal(half(tokens), model(tokens, dtype=torch.bfloat16))


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceLease]:
    """A lease of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with closing(device_lease(CPU)) as found:
        yield found


def test_a_bigger_model_takes_longer_and_the_reference_takes_as_long_as_itself(
    lease: DeviceLease,
) -> None:
    reference = Architecture.parse(REFERENCE)
    bigger = {**REFERENCE, "blocks": REFERENCE["blocks"] * 4}
    found = {}
    for name, one in (("same", reference), ("four times", Architecture.parse(bigger))):
        model = deployed(one, one.build(), torch.float32)
        tokens = tokens_for(PREFILL, 256)
        found[name] = measure_latency(model, tokens, PREFILL, QUICK, lease, {})
    assert 0.6 < found["same"].details["ratio"] < 1.6
    assert found["four times"].details["ratio"] > 1.7


def test_the_value_is_the_ratio_times_the_reference_of_the_study(lease: DeviceLease) -> None:
    one = architecture()
    model = deployed(one, one.build(), torch.float32)
    tokens, threads, collects = tokens_for(DECODE), torch.get_num_threads(), gc.isenabled()
    found = measure_latency(model, tokens, DECODE, QUICK, lease, {DECODE.key: 1000.0})
    assert found.value == found.details["ratio"] * 1000.0
    assert found.details["reference_ms"] == 1000.0
    other = measure_latency(model, tokens, DECODE, QUICK, lease, {"another machine": 1000.0})
    assert other.value == other.details["ratio"] * other.details["reference_ms"]
    assert other.details["reference_ms"] < 1000.0
    for details in (found.details, other.details):
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
