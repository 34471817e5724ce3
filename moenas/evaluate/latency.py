"""Latency as a ratio to a fixed reference model, timed while no other work of ours is running."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moenas.evaluate.cuda_graphs import CaptureError
from moenas.evaluate.device_lock import DeviceLock
from moenas.evaluate.devices import device_key, device_name
from moenas.evaluate.dtypes import deployed_dtype
from moenas.evaluate.subject import Subject, excerpts
from moenas.evaluate.threads import cpu_threads
from moenas.evaluate.timing import DeviceClock, Run, WallClock, replayed, time_pairs
from moenas.model.architecture import Architecture, Model, initialise
from moenas.model.mixers.mixer import KVCache
from moenas.model.moe.gating import Gating
from moenas.records import Plain
from moenas.space.objective import Measurement
from moenas.space.sections import Protocol

REFERENCE_VERSION = 1
"""Goes into the key of every reference time; a new REFERENCE needs a new number."""

_ATTENTION: Plain = {
    "kind": "attention",
    "head_dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "rope": {"theta": 10000.0},
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

DEVICE_REFERENCE_VERSION = 1
"""The same for DEVICE_REFERENCE."""
DEVICE_REFERENCE: Plain = {
    **REFERENCE,
    "d_model": 1024,
    "blocks": [
        {
            "repeat": 4,
            "mixer": {**_ATTENTION, "head_dim": 64, "n_heads": 16, "n_kv_heads": 4},
            "ffn": {
                "kind": "moe",
                "activation": "swiglu",
                "n_experts": 32,
                "d_expert": 512,
                "router": _ROUTER,
            },
        },
    ],
}
"""What latencies on a GPU are a ratio to: large enough that the GPU is at work, not the host."""

EAGER_RUNS = 10
"""Runs of the candidate without a CUDA graph."""


def device_lock(device: torch.device) -> DeviceLock:
    """Return the lock of a device; a step there has not ended while its kernels are queued."""
    cuda = device.type == "cuda"
    return DeviceLock(device_key(device), WallClock(device).synchronize if cuda else None)


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
        """Return the fields that are stored beside a value."""
        dtype = str(self.dtype).removeprefix("torch.")
        plain = {"phase": self.phase, "batch": self.batch, "context": self.context}
        return plain | {"dtype": dtype, "threads": self.threads}

    @property
    def key(self) -> str:
        """Name all that the time of the reference model depends on."""
        words = [f"{name} {value}" for name, value in self.plain().items()]
        reference = f"reference {REFERENCE_VERSION}"
        if self.device.type == "cuda":
            reference = f"device reference {DEVICE_REFERENCE_VERSION}, graphs"
        made = [f"torch {torch.__version__}", reference]
        return ", ".join([device_name(self.device), *words, *made])


PHASES: dict[str, Literal["decode", "prefill"]] = {"decode_ms": "decode", "prefill_ms": "prefill"}
"""Shipped objective -> the phase that it times."""


def workload_of(objective: str, protocol: Protocol, device: torch.device) -> Workload:
    """Return the workload that `decode_ms` or `prefill_ms` times on a device."""
    dtype, threads = deployed_dtype(protocol, device), protocol.threads
    batch, context = protocol.decode_batch, protocol.decode_context
    if PHASES[objective] == "prefill":
        batch, context = protocol.prefill_batch, protocol.prefill_tokens
    return Workload(PHASES[objective], batch, context, dtype, threads, device)


def inference_copy(architecture: Architecture, model: Model, dtype: torch.dtype) -> Model:
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
    copy = architecture.outline("meta")
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


def prepare(model: Model, tokens: Tensor, phase: str) -> Callable[[], object]:
    """Return one run of a workload: a prompt into an empty cache, or one step after it.

    Each step begins with the caches as the prompt left them. So all steps are equal, and what a
    CUDA graph reads is held for as long as the step is.
    """
    batch, length = tokens.shape
    if phase == "prefill":
        return lambda: model(tokens, model.new_cache(batch, length))
    cache = model.new_cache(batch, length)
    model(tokens[:, :-1], cache)
    after_prompt = [each for layer in cache if layer is not None for each in _cache_states(layer)]

    def step() -> object:
        cache.length = length - 1
        for layer, known in after_prompt:
            vars(layer).update(known)
        return model(tokens[:, -1:], cache)

    return step


def _cache_states(cache: object) -> Iterator[tuple[object, dict[str, Any]]]:
    """Yield a cache and the caches in it, such as an indexer's, each with its attributes."""
    yield cache, dict(vars(cache))
    for value in vars(cache).values():
        if isinstance(value, KVCache):
            yield from _cache_states(value)


def _reference(workload: Workload) -> tuple[Model, Tensor]:
    """Build the reference model and draw its tokens."""
    device = workload.device
    architecture = Architecture.parse(DEVICE_REFERENCE if device.type == "cuda" else REFERENCE)
    model = architecture.outline(device)
    initialise(model, 0, device)
    model = inference_copy(architecture, model, workload.dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(architecture.vocab_size, workload.tokens, generator=generator)
    return model, tokens.to(device)


@dataclass(frozen=True)
class _Side:
    """A candidate or the reference, ready to be timed."""

    run: Run
    held: tuple[object, ...]
    """What a CUDA graph reads, and does not hold: the model, its tokens, its caches."""
    captured: bool = False
    """Whether it is replayed from a CUDA graph."""
    fault: str | None = None
    """Why a capture failed."""


def _side(model: Model, tokens: Tensor, workload: Workload) -> _Side:
    """Return a model under a workload; on CUDA as a graph that is replayed, if it can be."""
    run = prepare(model, tokens, workload.phase)
    device, held = workload.device, (run, model, tokens)
    if device.type != "cuda" or not model.capturable(workload.dtype, device):
        return _Side(run, held)
    try:
        return _Side(replayed(run, device), held, captured=True)
    except CaptureError as error:
        return _Side(run, held, fault=str(error))


@torch.inference_mode()
def measure_latency(
    model: Model,
    tokens: Tensor,
    workload: Workload,
    protocol: Protocol,
    lock: DeviceLock,
    reference_ms: Mapping[str, float],
) -> Measurement:
    """Time an `inference_copy` of a model on `tokens` of shape `workload.tokens`, in ms.

    value = median paired ratio * the reference's time, which is `reference_ms[workload.key]`, or
    the median measured here if the study has not fixed one. `noisy` says that the ratio's
    interval stayed wider than `protocol.precision`. `contended` says that other processes took
    CPU time meanwhile (one thread on a CPU only; more threads spin while they wait).

    On a GPU both sides are replayed from CUDA graphs and timed by its own events, as an engine
    runs them; `eager_ms` is the wall time of the candidate without a graph. `captured` is false
    for a model that waits for the device, whose value is then timed without one.
    """
    collecting = gc.isenabled()
    on_cuda = workload.device.type == "cuda"
    clock = (DeviceClock if on_cuda else WallClock)(workload.device)
    with cpu_threads(workload.threads):
        try:
            with lock.shared():
                candidate = _side(model, tokens, workload)
                reference = _side(*_reference(workload), workload)
            gc.disable()
            with lock.exclusive():
                pairs = time_pairs(candidate.run, reference.run, protocol, clock)
                eager = _eager_ms(model, tokens, workload) if on_cuda else None
        finally:
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
    if eager is not None:
        details |= {"captured": candidate.captured, "eager_ms": eager}
        fault = candidate.fault or reference.fault
        details |= {} if fault is None else {"capture_fault": fault}
    elif workload.threads == 1:
        details |= pairs.contention()
    return Measurement(pairs.ratio * fixed, details)


def candidate_latency(
    subject: Subject, phase: Literal["decode", "prefill"], batch: int, context: int
) -> Measurement:
    """Time a phase of a candidate on text of the validation split, in ms; see `measure_latency`.

    `context` is the number of tokens in the cache of each sequence at decoding, or of each prompt.
    """
    protocol, device = subject.protocol, subject.device
    dtype = deployed_dtype(protocol, device)
    workload = Workload(phase, batch, context, dtype, protocol.threads, device)
    tokens = excerpts(subject.corpus, *workload.tokens).to(device)
    model = inference_copy(subject.architecture, subject.model, dtype)
    measured = measure_latency(
        model, tokens, workload, protocol, subject.device_lock, subject.reference_ms
    )
    subject.timed.append(dict(measured.details))
    return measured


def _eager_ms(model: Model, tokens: Tensor, workload: Workload) -> float:
    """Return the median wall time of some runs without a graph, ms."""
    run, clock = prepare(model, tokens, workload.phase), WallClock(workload.device)
    run()
    return 1000 * statistics.median(clock.sample(run, 1)[0] for _ in range(EAGER_RUNS))
