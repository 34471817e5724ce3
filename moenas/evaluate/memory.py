"""Peak bytes of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moenas.evaluate.cuda_graphs import side_stream


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of every storage from its first appearance until it is freed.

    Views share a storage and count once. Scratch space inside one operator is not seen.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        meta = storage.device.type == "meta"  # without an address, as fake tensors are
        address, size = storage._cdata if meta else storage.data_ptr(), storage.nbytes()
        if not size or address in self.storages:
            return

        def freed(_: object) -> None:
            del self.storages[address]
            self.live -= size

        self.storages[address] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output


def peak_bytes(work: Callable[[], object], held: Iterable[Tensor], device: torch.device) -> int:
    """Run `work` and return the peak of bytes that it and the tensors in `held` take at once.

    On a CPU that is the sum of live tensor storages. It depends on the program alone, not on the
    allocator or other tensors of the process. On CUDA it is the allocator's peak of requested
    bytes, less the tensors that lived before and are not in `held`. Whole blocks would depend on
    the cache of the allocator.
    """
    held = list(held)
    if device.type != "cuda":
        tensors = _LiveTensors(held)
        with tensors:
            work()
        return tensors.peak
    _warm_up(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    torch.cuda.synchronize(device)
    requested = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    others = requested - sum(storages.values())
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - others)


def _warm_up(device: torch.device) -> None:
    """Let the libraries of CUDA take their workspaces, which they keep, out of torch's allocator.

    cuBLAS and cuBLASLt take 32 MiB each at their first product on a stream. Without this the peak
    would depend on whether anything was computed before.
    """
    for stream in (torch.cuda.current_stream(device), side_stream(device)):
        with torch.cuda.stream(stream):
            _use_libraries(device)


def _use_libraries(device: torch.device) -> None:
    """Compute something with each library that keeps a workspace for the current stream."""
    with torch.inference_mode(False), torch.enable_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(2, 64, 64, device=device, dtype=dtype, requires_grad=True)
            bias = torch.zeros(64, device=device, dtype=dtype)
            y = torch.addmm(bias, x[0], x[1]) + F.linear(x[0], x[1], bias) + torch.bmm(x, x).sum(0)
            heads = x.view(1, 2, 64, 64)
            attended = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            (y.sum() + attended.sum()).backward()
