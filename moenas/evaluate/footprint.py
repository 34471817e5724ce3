"""The memory that a candidate needs, estimated before it is built, against the free memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from moenas.errors import NoRoomError
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.trainee import Trainee
from moenas.model.architecture import Architecture
from moenas.space.sections import Recipe

GIB = 2**30
TRAINED, HELD = 16, 4
"""Bytes of a parameter in training (weight, gradient, two moments in float32) and out of it."""

KEPT = 4
"""Upper bound of the bytes that a pass keeps for its gradient, for each of its operations. Over 30
random models of all parts the most was 0.8, the median 0.3. Only what may be too much is worked out
exactly."""


# --- memory that a candidate needs -------------------------------------------------------------


class _GroupedProduct(torch.autograd.Function):
    """A grouped product of fake tensors, whose own kernel gives shapes for bfloat16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(rows, stack)
        return rows.new_empty(rows.shape[0], stack.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        rows, stack = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(stack)


class _Shapes(TorchFunctionMode):
    """Replaces grouped products by ones that give shapes for every type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.grouped_mm, torch._grouped_mm):
            return _GroupedProduct.apply(args[0], args[1])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_memory() -> Iterator[None]:
    """Give new tensors a shape, a type and a device, and no storage."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Shapes():
        yield


def training_bytes(architecture: Architecture, recipe: Recipe, device: torch.device) -> int:
    """Return the peak of live tensors of a training step, in bytes, without allocating them.

    Weights, gradients, both moments of AdamW and what the pass keeps for its gradient. The step is
    run on fake tensors, so it is the program's own; see `memory.peak_bytes`.
    """
    dtype = training_dtype(recipe, device)
    with _without_memory():
        model = architecture.outline(device)
        heads = None if recipe.heads is None else recipe.heads.outline(architecture, device)
        trainee = Trainee(model, heads)
        trainee.train()
        held = [x for stack in trainee.stacks() for x in (*stack.parameters(), *stack.buffers())]
        moments = [torch.empty_like(weight) for weight in trainee.parameters() for _ in range(2)]
        tokens = torch.zeros(recipe.batch, recipe.context, dtype=torch.int64, device=device)

        def step() -> None:
            trainee.losses(tokens, tokens, dtype)[1].backward()
            nn.utils.get_total_norm([w.grad for w in trainee.parameters() if w.grad is not None])

        return peak_bytes(step, [*held, *moments], torch.device("cpu"))


def holding_bytes(architecture: Architecture) -> int:
    """Return the bytes of the weights of a model, in float32."""
    return HELD * architecture.cost(2).params


# --- memory of a device -------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on a device; None if it is unknown.

    On a CPU it is the least of two: the memory that the kernel calls available, and the free memory
    of each control group above this process. Files in the page cache count as free. On CUDA what
    the driver and torch's allocator have left.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    bounds = [*_available(), *_groups()]
    return max(0, min(bounds)) if bounds else None


def all_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory of a device that candidates share; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = [limit for limit, _ in _limits()]
    totals = [size for name, size in _sizes() if name == "MemTotal"]
    return min([*totals, *limits], default=None)


def _available() -> Iterator[int]:
    return (size for name, size in _sizes() if name == "MemAvailable")


def _sizes(path: str = "/proc/meminfo") -> Iterator[tuple[str, int]]:
    """Yield the names and bytes of /proc/meminfo."""
    for line in _lines(path):
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if unit == "kB" and number.isdigit():
            yield name, int(number) * 1024


def _groups(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> Iterator[int]:
    """Yield what each control group with a limit leaves: version 2, then version 1."""
    return (left for _, left in _limits(root, own))


def _limits(
    root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup"
) -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group that has one, and the bytes that are free below it."""
    for line in _lines(own):
        number, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if number == "0" and not controllers:
            place, files = Path(root), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in names:
            place = Path(root, "memory")
            files = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        inner = place / path.strip().lstrip("/")
        for folder in [inner, *inner.parents]:
            limit = _left(folder, *files)
            if limit is not None:
                yield limit
            if folder == place:
                break


def _left(folder: Path, limit: str, usage: str, cached: str) -> tuple[int, int] | None:
    """Return the limit of a control group and the bytes free below it; None if it has none."""
    most, used = (next(iter(_lines(folder / name)), "") for name in (limit, usage))
    if not most.strip().isdigit() or not used.strip().isdigit():
        return None
    files = 0
    for line in _lines(folder / "memory.stat"):
        name, _, size = line.partition(" ")
        files = int(size) if name == cached and size.strip().isdigit() else files
    return int(most), int(most) - int(used) + files


def _lines(path: str | os.PathLike[str]) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, ValueError):
        return []


# --- whether it fits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The memory that a candidate needs, and the free memory, in bytes."""

    needed: int
    free: int | None
    """None if it is unknown."""
    device: str
    work: str
    """What the memory is for."""
    sharers: int = 1
    """Candidates that share the device at one time."""
    at_least: bool = False
    """Whether `needed` leaves out activations, as the rest is too much already."""

    @property
    def fits(self) -> bool:
        """Whether it fits the free memory; True if that is unknown."""
        return self.free is None or self.needed <= self.free // self.sharers

    def fits_share(self, whole: int | None) -> bool:
        """Whether it fits into what is free, and into an equal share of the whole memory."""
        if self.free is None or whole is None:
            return False
        return self.needed <= min(self.free, whole // self.sharers)

    def __str__(self) -> str:
        least = "at least " if self.at_least else ""
        shared = f" for each of {self.sharers} candidates at a time" if self.sharers > 1 else ""
        free = "unknown" if self.free is None else _size(self.free // self.sharers)
        return (
            f"{self.work} needs {least}{_size(self.needed)} of memory, {self.device} has"
            f" {free} free{shared}"
        )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def fit(
    architecture: Architecture,
    recipe: Recipe,
    device: torch.device,
    *,
    training: bool,
    sharers: int = 1,
) -> Fit:
    """Compare what a candidate needs with what its device has; nothing is built.

    `training`: it is trained; else its weights are held.
    """
    free = free_bytes(device)
    name = "the machine" if device.type == "cpu" else f"the device {device}"
    if not training:
        return Fit(holding_bytes(architecture), free, name, "the model", sharers)
    work = f"a training step of {recipe.batch} x {recipe.context} tokens"
    cost = recipe.training_cost(architecture)
    least = TRAINED * cost.params
    quick = Fit(least, free, name, work, sharers, at_least=True)
    if not quick.fits:
        return quick
    most = least + KEPT * recipe.batch * recipe.context * cost.flops_per_token
    bound = Fit(most, free, name, work, sharers)
    if bound.fits:
        return bound
    needed = training_bytes(architecture, recipe, device)
    return Fit(needed, free, name, work, sharers)


def require_fit(
    architecture: Architecture,
    recipe: Recipe,
    device: torch.device,
    *,
    training: bool,
    sharers: int = 1,
) -> None:
    """Refuse a candidate that does not fit its device.

    It fits if all that share the device would fit into the free memory, as at the start of a run.
    It also fits if it fits into its share of the whole, because the others may hold their shares
    already.

    Raises:
        NoRoomError: with the bytes that it needs and the bytes that are free.
    """
    result = fit(architecture, recipe, device, training=training, sharers=sharers)
    if not (result.fits or result.fits_share(all_bytes(device))):
        raise NoRoomError(f"{result}; nothing was built")
