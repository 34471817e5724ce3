"""Latency as a ratio to a fixed reference model, timed while no other work of ours is running."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moenas.architecture import Architecture, Model
from moenas.lease import DeviceLease
from moenas.objective import Measurement
from moenas.parts.gating import Gating
from moenas.records import Plain
from moenas.sections import Protocol

REFERENCE_VERSION = 1
"""Goes into the key of every reference time; a new REFERENCE needs a new number."""

_ATTENTION: Plain = {
    "kind": "attention",
    "head_dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "rope_theta": 10000.0,
    "qk_norm": "none",
}
_ROUTER: Plain = {"score": "softmax", "top_k": 2, "normalize": True, "balance": "none"}
REFERENCE: Plain = {
    "vocab_size": 256,
    "d_model": 128,
    "norm": "rmsnorm",
    "tie_embeddings": True,
    "blocks": [
        {
            "repeat": 2,
            "mixer": _ATTENTION,
            "ffn": {"kind": "dense", "activation": "swiglu", "d_ff": 384},
        },
        {
            "repeat": 2,
            "mixer": _ATTENTION,
            "ffn": {
                "kind": "moe",
                "activation": "swiglu",
                "n_experts": 8,
                "d_expert": 128,
                "router": _ROUTER,
            },
        },
    ],
}
"""The model that every latency is a ratio to. Its layers are of the kinds that candidates are made
of, so that both feel a busy or a throttled machine in the same way. Its weights are drawn with
seed 0, its tokens too."""

WARM_UP = 3
"""Runs of each side before the first pair."""
SAMPLE_SECONDS = 0.01
"""Shortest sample: several time slices of a scheduler."""
CONTENDED = 1.2
"""Wall time over CPU time above which a single-threaded measurement had to share its core."""


# --- the device --------------------------------------------------------------------------------


def device_key(device: torch.device) -> str:
    """Return what tells one device of this host from another: `cpu` or `cuda:<uuid>`."""
    if device.type == "cuda":
        return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
    return device.type


def device_name(device: torch.device) -> str:
    """Return the model name of a device; two devices of one name are taken to be equally fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_lease(device: torch.device) -> DeviceLease:
    """Return the lease of a device; a step there has not ended while its kernels are queued."""
    cuda = device.type == "cuda"
    return DeviceLease(device_key(device), (lambda: _settle(device)) if cuda else None)


def device_info(device: torch.device, threads: int, dtype: torch.dtype) -> Plain:
    """Return what an evaluation stores of the device that it ran on."""
    return {
        "key": device_key(device),
        "kind": device.type,
        "name": device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "host": socket.gethostname(),
    }


# --- pairs of times ----------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a confidence interval for the median, with at least 95 % coverage from 6 values on.

    It runs from the j-th smallest to the j-th largest value, with the largest j for which a
    binomial (n, 1/2) falls below j in at most 2.5 % of cases: it supposes nothing of the
    distribution (David and Nagaraja, Order Statistics, section 7.1). Fewer than 6 values give
    their range.
    """
    ordered, n = sorted(values), len(values)
    rank, below = 0, 1
    while below <= 0.025 * 2**n:
        rank += 1
        below += math.comb(n, rank)
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[n - rank]


@dataclass
class Pairs:
    """Times of one run of the candidate and of the reference, taken side by side, in seconds."""

    candidate: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    candidate_cpu: list[float] = field(default_factory=list)
    """CPU time of this process, all its threads together."""
    reference_cpu: list[float] = field(default_factory=list)
    runs: int = 1
    """Runs of the candidate in a sample, which a time is the mean of."""

    @property
    def ratios(self) -> list[float]:
        """Candidate over reference, pair by pair."""
        return [c / r for c, r in zip(self.candidate, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        """The median ratio: what both sides feel alike drops out of it."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half-width of the median ratio's 95 % confidence interval, as a share of the ratio."""
        low, high = median_interval(self.ratios)
        return (high - low) / 2 / self.ratio

    @property
    def mad(self) -> float:
        """Median absolute deviation of the ratios, as a share of the median ratio."""
        middle = self.ratio
        return statistics.median(abs(r - middle) for r in self.ratios) / middle

    def contention(self) -> Plain:
        """Return the median ratio by CPU time, and whether wall time was much longer than it."""
        cpu = zip(self.candidate_cpu, self.reference_cpu, strict=True)
        wall_per_cpu = sum(self.candidate + self.reference) / sum(
            self.candidate_cpu + self.reference_cpu
        )
        return {
            "cpu_ratio": statistics.median(c / r for c, r in cpu),
            "wall_per_cpu": wall_per_cpu,
            "contended": wall_per_cpu > CONTENDED,
        }


def time_pairs(
    candidate: Callable[[], object],
    reference: Callable[[], object],
    protocol: Protocol,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Time both sides in turn, in random order within each pair, until the ratio is known.

    A sample is one untimed run, which warms the caches that the other side has used, and then as
    many as make both samples equally long: were one much shorter, the scheduler would interrupt
    the other more often, and the ratio would depend on who else is there. It ends when the ratio's
    interval is as narrow as `protocol.precision`, after `max_repeats` pairs, or after
    `max_seconds` and 3 pairs.

    The clock is wall time from a settled device to a settled device: what a caller waits. CPU time
    would leave out what is waited for memory, locks or a GPU, and adds up threads that only spin.
    """
    pairs, order = Pairs(), random.Random(0)
    quickest = [_quickest(run, device, clock) for run in (candidate, reference)]
    length = max(*quickest, SAMPLE_SECONDS)
    pairs.runs, reference_runs = (max(1, round(length / seconds)) for seconds in quickest)
    sides = (
        (candidate, pairs.runs, pairs.candidate, pairs.candidate_cpu),
        (reference, reference_runs, pairs.reference, pairs.reference_cpu),
    )
    started = clock()
    while True:
        for run, runs, wall, cpu in sides if order.random() < 0.5 else sides[::-1]:
            run()
            _settle(device)
            wall_start, cpu_start = clock(), time.process_time()
            for _ in range(runs):
                run()
            _settle(device)
            wall.append((clock() - wall_start) / runs)
            cpu.append((time.process_time() - cpu_start) / runs)
        n = len(pairs.candidate)
        late = n >= 3 and clock() - started >= protocol.max_seconds
        if n >= protocol.max_repeats or late:
            return pairs
        if n >= protocol.min_repeats and pairs.spread <= protocol.precision:
            return pairs


def _quickest(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Warm up and return the shortest time of a run, seconds."""
    times = []
    for _ in range(WARM_UP):
        started = clock()
        run()
        _settle(device)
        times.append(clock() - started)
    return min(times)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- a model under a workload ------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is timed, and where. Equal workloads on devices of one name share a reference time."""

    phase: Literal["decode", "prefill"]
    batch: int
    context: int
    """Tokens in the cache of each sequence, or tokens of each prompt."""
    dtype: torch.dtype
    threads: int
    device: torch.device

    @property
    def tokens(self) -> tuple[int, int]:
        """Shape of the tokens that it needs."""
        return self.batch, self.context + (1 if self.phase == "decode" else 0)

    def plain(self) -> Plain:
        """Return what stands beside a value."""
        dtype = str(self.dtype).removeprefix("torch.")
        found = {"phase": self.phase, "batch": self.batch, "context": self.context}
        return found | {"dtype": dtype, "threads": self.threads}

    @property
    def key(self) -> str:
        """Name all that the time of the reference model depends on."""
        words = [f"{name} {value}" for name, value in self.plain().items()]
        made = [f"torch {torch.__version__}", f"reference {REFERENCE_VERSION}"]
        return ", ".join([device_name(self.device), *words, *made])


def deployed(architecture: Architecture, model: Model, dtype: torch.dtype) -> Model:
    """Return the model as it would be run: its matrices are stored in the type they compute in.

    A trained model casts its float32 weights at each use, which one who decodes does once.
    Routers, norms and biases stay float32, so tokens go where they went. What keeps its type is
    shared with `model`.
    """
    kept = tuple(n for n, m in model.named_modules() if isinstance(m, Gating))
    state = {
        name: value.to(dtype) if value.ndim >= 2 and not name.startswith(kept) else value
        for name, value in model.state_dict().items()
    }
    copy = architecture.build("meta")
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


def prepare(model: Model, tokens: Tensor, phase: str) -> Callable[[], object]:
    """Return one run of a workload: a prompt into an empty cache, or one step after it."""
    batch, length = tokens.shape
    if phase == "prefill":
        return lambda: model(tokens, model.new_cache(batch, length))
    cache = model.new_cache(batch, length)
    model(tokens[:, :-1], cache)

    def step() -> object:
        cache.length = length - 1
        for layer in cache:
            if layer is not None:
                layer.length = length - 1
        return model(tokens[:, -1:], cache)

    return step


def _reference(workload: Workload) -> tuple[Model, Tensor]:
    """Build the reference model and draw its tokens."""
    architecture = Architecture.parse(REFERENCE)
    model = deployed(architecture, architecture.build(workload.device), workload.dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(architecture.vocab_size, workload.tokens, generator=generator)
    return model, tokens.to(workload.device)


@torch.inference_mode()
def measure_latency(
    model: Model,
    tokens: Tensor,
    workload: Workload,
    protocol: Protocol,
    lease: DeviceLease,
    reference_ms: Mapping[str, float],
) -> Measurement:
    """Time a model (see `deployed`) on `tokens` of shape `workload.tokens`; the value is in ms.

    value = median paired ratio * the reference's time, which is `reference_ms[workload.key]`, or
    the median measured here if the study has not fixed one. `noisy` says that the ratio's
    interval stayed wider than `protocol.precision`. `contended` says that other processes took
    CPU time meanwhile (one thread on a CPU only; more threads spin while they wait).
    """
    threads = torch.get_num_threads()
    collecting = gc.isenabled()
    torch.set_num_threads(workload.threads)
    try:
        with lease.working():
            candidate = prepare(model, tokens, workload.phase)
            reference = prepare(*_reference(workload), workload.phase)
        gc.disable()
        with lease.exclusive():
            pairs = time_pairs(candidate, reference, protocol, workload.device)
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    measured = 1000 * statistics.median(pairs.reference)
    fixed = reference_ms.get(workload.key, measured)
    details = workload.plain() | {
        "ratio": pairs.ratio,
        "spread": pairs.spread,
        "mad": pairs.mad,
        "n": len(pairs.candidate),
        "runs": pairs.runs,
        "noisy": pairs.spread > protocol.precision,
        "wall_ms": 1000 * statistics.median(pairs.candidate),
        "reference_ms": fixed,
        "reference_key": workload.key,
    }
    if workload.device.type == "cpu" and workload.threads == 1:
        details |= pairs.contention()
    return Measurement(pairs.ratio * fixed, details)
