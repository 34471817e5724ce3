"""The device that is measured, its clock, and the sizes that it is measured at."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch

T = TypeVar("T")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
PEAK = 790e12
"""FLOP/s of a large product in bfloat16 on an H100 or H200: what an MFU is a share of."""
LIBRARIES = ("numpy", "triton", "transformers", "optuna", "ray")
MIB, GIB = 2**20, 2**30


def sized(full: T, tiny: T) -> T:
    """Return the size to measure at: `tiny` without a GPU, where a run only shows that it runs."""
    return full if GPU else tiny


def machine() -> dict[str, Any]:
    """Return the card, its memory and processors, and the versions of the libraries on it; `card`
    None without."""
    facts: dict[str, Any] = {
        "card": None,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in LIBRARIES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    if GPU:
        card = torch.cuda.get_device_properties(DEVICE)
        facts |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / GIB),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if GPU:
        torch.cuda.synchronize()


def release() -> None:
    """Free what nothing refers to, and give the memory back to the card."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def milliseconds(work: Callable[[], object], repeats: int = 30, warm_up: int = 5) -> float:
    """Return the median time of a call by events on the device; by the clock, once, without one."""
    for _ in range(sized(warm_up, 1)):
        work()
    if not GPU:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Return the wall time of one call, until the device has done it, and its result."""
    synchronize()
    began = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - began, result


def captured(
    work: Callable[[], T], warm_up: int = 2, stream: torch.cuda.Stream | None = None
) -> tuple[Callable[[], None], T]:
    """Capture a call in a CUDA graph; return its replay, and the output that replays write into.

    Warm-up and capture run on one stream, which waits for the work that was queued before. Autograd
    keeps the stream of the first use with a parameter: what ran on a side stream names it.
    """
    before = torch.cuda.current_stream()
    stream, graph = stream or torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    stream.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = work()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream in place
    before.wait_stream(stream)
    return graph.replay, result


def reads_nothing(work: Callable[[], object]) -> bool | str:
    """Say whether a call makes the host wait for the device nowhere; else what torch says."""
    if not GPU:
        work()
        return True
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0][:160]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def kernels(work: Callable[[], object], top: int = 20) -> list[str]:
    """Return a line for the kernels of a call that take most of the GPU's time, a total first."""
    from torch.profiler import ProfilerActivity, profile

    work()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        work()
        synchronize()
    rows = [e for e in profiler.key_averages() if "CUDA" in str(e.device_type)]
    rows = sorted(rows, key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows)
    lines = [f"busy {total / 1e3:.2f} ms in {sum(e.count for e in rows)} kernels"]
    for e in rows[:top]:
        lines.append(f"{e.self_device_time_total / 1e3:8.3f} ms {e.count:5d} x {e.key[:120]}")
    return lines


def peak_gib() -> float:
    """Return the most memory that tensors took since the last call, in GiB, and reset it."""
    if not GPU:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak
