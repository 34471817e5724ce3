"""CUDA graphs: work on a device that the host launches as one thing.

All captures of a process share one side stream of each device. cuBLAS keeps a workspace for every
stream that it was used on, 32 MiB or more. With a stream for each candidate that memory would grow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from moenas.failures import is_out_of_memory, located

faults: list[str] = []
"""Why captures of this process failed. PyTorch's allocator and random generator may be left as in
the middle of a capture. So no other capture is tried, and a worker process ends after its
candidate."""


class CaptureError(RuntimeError):
    """Work cannot be captured; the text says why, with file and line."""


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device that graphs are captured on, and their warm-up runs on."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of one run of `work`, which does not run it.

    `work` must have run on the side stream before. The caller must hold every tensor that it reads
    for as long as the graph is replayed.

    Raises:
        CaptureError: if it cannot be captured, as it waits for the device.
        torch.OutOfMemoryError: if there is no room for it.
    """
    if faults:
        raise CaptureError(f"an earlier capture of this process failed: {faults[0]}")
    stream, before = side_stream(device), torch.cuda.current_stream(device)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    except RuntimeError as error:
        first = innermost(error)
        faults.append(located(first))
        if is_out_of_memory(first):
            raise first from None
        raise CaptureError(faults[-1]) from error
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
    return graph


def innermost(error: BaseException) -> BaseException:
    """Return the error that came first: the end of a failed capture raises one of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error
