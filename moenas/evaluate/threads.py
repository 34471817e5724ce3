"""The number of CPU threads that PyTorch computes with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(count: int | None = None) -> Iterator[None]:
    """Compute with `count` CPU threads, None for as many as before; restore the number at the end.

    The order of sums, and so their last bits, depend on it.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
