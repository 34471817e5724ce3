"""The small layers that every part is made of: matrix products, and a short causal convolution.

Parameters are float32 masters. Activations have the dtype of `x`, and a weight is cast where it is
used. So a model computes in bfloat16 without autocast and without a second copy of itself. A module
with a method `start(generator)` draws the first values of its own parameters by it. The weights
that write into the residual stream are found by their names: see `output_projections`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRITES = ("out", "down", "leave", "experts", "shared", "zero", "vector")
"""Names in a part, and in what they name, of what its output comes out of."""


def output_projections(part: Any) -> list[nn.Parameter]:
    """Return the weights whose products are what a part adds to the residual stream.

    The output is proportional to them, biases and experts that pass their input on aside. They are
    found from the part on by the names in WRITES, or in the attribute `writes` of a module that has
    others. A module with none of these names writes by its `weight`.
    """
    weights: list[nn.Parameter] = []
    for name in getattr(part, "writes", WRITES):
        child = getattr(part, name, None)
        if isinstance(child, nn.Parameter):
            weights.append(child)
        elif isinstance(child, nn.Module):
            weights += output_projections(child)
    weight = getattr(part, "weight", None)
    return [weight] if not weights and isinstance(weight, nn.Parameter) else weights


def size(length: Any) -> Any:
    """Return a length of a shape: a tensor of `torch.jit.trace` as a number, all else as it is.

    A length that `torch.export` keeps open stays so; `int` would fix it.
    """
    return int(length) if isinstance(length, Tensor) else length


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module itself that are weights: drawn at random, and decaying.

    The attribute `matrices` names them: a bias that is stacked for experts has two axes and is no
    matrix. A rate is none either. Of a module without it they are those with two axes or more.
    """
    own = dict(module.named_parameters(recurse=False))
    named = getattr(module, "matrices", None)
    if named is None:
        return [weight for weight in own.values() if weight.dim() > 1]
    return [weight for name, weight in own.items() if name in named]


def on_cuda(x: Tensor) -> bool:
    """Whether a tensor is on CUDA, where a part has its own faster or exact implementation.

    Use it alone, as the condition of an `if` that returns. An export leaves such code out.
    """
    return x.is_cuda


class Linear(nn.Module):
    """A matrix product, `x @ weight.T`, plus a bias if there is one."""

    matrices = ("weight",)

    def __init__(self, d_in: int, d_out: int, biased: bool = False) -> None:
        super().__init__()
        self.d_in = d_in
        self.d_out = d_out
        self.biased = biased
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out) in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LowRank(nn.Module):
    """A matrix product through a narrow width, `up(down(x))`."""

    writes = ("up",)

    def __init__(self, d_in: int, rank: int, d_out: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.rank = rank
        self.d_out = d_out
        self.down = Linear(d_in, rank)
        self.up = Linear(rank, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out) in the dtype of `x`."""
        y: Tensor = self.up(self.down(x))
        return y


class Convolution(nn.Module):
    """Each channel is mixed over the last `kernel` tokens: `sum_i weight[:, i] x[t - K + 1 + i]`.

    A sum of `kernel` shifted copies, element by element: there is no matrix product in it.
    """

    matrices = ("weight",)

    def __init__(self, width: int, kernel: int, biased: bool) -> None:
        super().__init__()
        self.width = width
        self.kernel = kernel
        self.biased = biased
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def start(self, generator: torch.Generator) -> None:
        """Draw uniform weights of deviation 1 / sqrt(3 kernel), as torch.nn.Conv1d does."""
        bound = self.kernel**-0.5
        drawn = torch.empty(self.width, self.kernel).uniform_(-bound, bound, generator=generator)
        self.weight.data.copy_(drawn)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, S, width) to the same shape; `before` holds the last K - 1 tokens, else 0.

        Also returns the K - 1 tokens that the next call needs.
        """
        length, past = x.shape[1], self.kernel - 1
        x = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat((before, x), dim=1)
        weight = self.weight.to(x.dtype)
        y = x[:, past:] * weight[:, past]
        for i in range(past):
            y = y + x[:, i : i + length] * weight[:, i]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y, x[:, length:]
