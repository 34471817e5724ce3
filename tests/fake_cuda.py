"""Fake tensors of a CUDA device, on a machine and with a PyTorch that have none.

`fake_cuda()` gives tensors a shape, a type and a device, and no storage. A read of a value by the
host raises DataDependentOutputException, operands of two devices raise RuntimeError, and so does a
copy from the CPU to the device in `no_copies()`. It serves forward passes: a backward pass of such
tensors crashes a PyTorch without CUDA. Whole steps run `on_meta()`, where a read raises, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moenas.footprint import _Shapes as AnyGroupedProduct

CUDA = torch.device("cuda", 0)


class _WithoutGuards(TorchFunctionMode):
    """Does by operators what Python's bindings do under a guard of the device.

    A PyTorch without CUDA refuses the guard; the operators themselves know fake tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].device.type == "cuda":
            if func is Tensor.__getitem__:
                return _item(args[0], args[1])
            if func is Tensor.contiguous:
                whole = args[0].is_contiguous()
                return args[0] if whole else args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _item(x: Tensor, place: Any) -> Tensor:
    """Return x[place] for slices, numbers, None, Ellipsis and tensors of numbers."""
    places = place if isinstance(place, tuple) else (place,)
    used = sum(p is not None and p is not Ellipsis for p in places)
    full = [slice(None)] * (x.dim() - used)
    at = next((i for i, p in enumerate(places) if p is Ellipsis), None)
    places = (*places, *full) if at is None else (*places[:at], *full, *places[at + 1 :])
    dim, tensors = 0, {}
    for p in places:
        if p is None:
            x = x.unsqueeze(dim)
        elif isinstance(p, int):
            x, dim = x.select(dim, p), dim - 1
        elif isinstance(p, Tensor):
            tensors[dim] = p
        else:
            start, stop, step = p.start, p.stop, p.step or 1
            x = torch.ops.aten.slice.Tensor(x, dim, start, stop, step)
        dim += 1
    if not tensors:
        return x
    return torch.ops.aten.index.Tensor(x, [tensors.get(i) for i in range(x.dim())])


class _WithoutKernel(TorchFunctionMode):
    """Leaves out the kernel of AdamW, which knows no tensors without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch._fused_adamw_ else func(*args, **(kwargs or {}))


class _NoCopies(TorchDispatchMode):
    """Refuses to copy from the CPU to a device: a CUDA graph cannot, and a step must not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        given = [x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gives = [x.device.type for x in tree_leaves(found) if isinstance(x, Tensor)]
        if (
            "cpu" in given
            and set(gives) & {"cuda", "meta"}
            and name in ("_to_copy", "copy_", "copy")
        ):
            raise RuntimeError(f"a copy from the CPU to the device: {name}")
        return found


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let tensors be fake; those made on `CUDA` have that device."""
    with FakeTensorMode(allow_non_fake_inputs=True), AnyGroupedProduct(), _WithoutGuards():
        yield


@contextmanager
def on_meta() -> Iterator[None]:
    """Let a whole training step run on tensors of the meta device."""
    with AnyGroupedProduct(), _WithoutKernel():
        yield


@contextmanager
def no_copies() -> Iterator[None]:
    """Refuse copies from the CPU to the device meanwhile."""
    with _NoCopies():
        yield
