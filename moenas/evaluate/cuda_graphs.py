"""CUDA graphs: work on a device that the host launches as one thing.

All captures of a process share one side stream of each device. cuBLAS keeps a workspace for every
stream that it was used on, 32 MiB or more, so that a stream for each candidate would hold memory
for good.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device that graphs are captured on, and their warm-up runs on."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of one run of `work`, which does not run it.

    `work` must have run on the side stream before.

    Raises:
        RuntimeError: if it cannot be captured, as it waits for the device.
    """
    stream, before = side_stream(device), torch.cuda.current_stream(device)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
    return graph
