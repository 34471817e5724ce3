"""CUDA without a device: the forms of parts for it, on the CPU or on tensors without values.

On fake tensors no value is read, devices do not mix, and nothing is copied from the host: each of
them raises. That is what a step must keep to that is captured in a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moenas.evaluate.footprint import _Shapes
from moenas.model.mixers.softmax_attention import Kernel


@contextmanager
def cuda_forms() -> Iterator[None]:
    """Let every part take its form for CUDA, whatever device its tensors lie on."""
    answers: dict[str, Any] = {"on_cuda": lambda x: True, "row_multiple": lambda x, e, n: 1}
    modules = [m for name, m in sys.modules.items() if name.startswith("moenas.")]
    kept = [(m, name, vars(m)[name]) for m in modules for name in answers if name in vars(m)]
    for module, name, _ in kept:
        setattr(module, name, answers[name])
    exists = Kernel.exists
    Kernel.exists = lambda *args: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.exists = exists  # type: ignore[method-assign]
        for module, name, own in kept:
            setattr(module, name, own)


class NoHostCopies(TorchDispatchMode):
    """Raises where values go from the CPU to another device; a graph would keep the first ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func.overloadpacket in (aten.lift_fresh, aten.detach_):  # of `torch.tensor`
            raise AssertionError(f"{tuple(args[0].shape)} numbers come from the host")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()]
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            source = given[-1] if given else None
            into = kwargs.get("device") or (given[0].device if given else None)
            if source is not None and source.device.type == "cpu" != torch.device(into).type:
                raise AssertionError(
                    f"{func} copies {tuple(source.shape)}; they come from the host"
                )
        return func(*args, **kwargs)


class WithoutAdamW(TorchFunctionMode):
    """Leaves out the kernel of AdamW, which knows no tensors without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch._fused_adamw_ else func(*args, **(kwargs or {}))


class NoCollisions(TorchDispatchMode):
    """Raises where floats are added up at one place, on CUDA by atomic adds in an unknown order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("index_put", "_index_put_impl") and (
            kwargs.get("accumulate") or True in args[3:4]
        ):
            raise AssertionError(f"{func} accumulates")
        if name in ("index_add", "scatter_add", "scatter_reduce") and args[0].is_floating_point():
            dim, index = args[1] % args[0].dim(), args[2]
            index = index if index.dim() == args[0].dim() else index.unsqueeze(-1)
            ordered = index.movedim(min(dim, index.dim() - 1) if index.dim() > 1 else 0, 0)
            ordered = ordered.sort(dim=0).values
            if (ordered.diff(dim=0) == 0).any():
                raise AssertionError(f"{func} adds several numbers at one place")
        return func(*args, **kwargs)


@contextmanager
def fake_device(*, gradients: bool) -> Iterator[torch.device]:
    """Give a device whose tensors have no values, and take the forms of parts for CUDA.

    It is CUDA where torch is built for it, and with `gradients` where there is a device. Else it is
    the meta device, whose fake tensors are as strict.
    """
    cuda = torch.cuda.is_available() if gradients else torch.backends.cuda.is_built()
    with FakeTensorMode(allow_non_fake_inputs=True), _Shapes(), cuda_forms():
        yield torch.device("cuda" if cuda else "meta")
