"""Weights between models of transformers and ours, by one small table for each family.

A row names a weight of ours, those of theirs, and how theirs become ours. `{}` stands for the
number of a layer; a row whose weights a layer does not have is left out. Every rule only moves
numbers, so the way back is found by moving their places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Row = tuple[str, tuple[str, ...], Callable[..., Tensor]]
Weights = dict[str, Tensor]


def same(x: Tensor) -> Tensor:
    return x


def stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def transposed(x: Tensor) -> Tensor:
    return x.mT


def squeezed(x: Tensor) -> Tensor:
    """The kernels (C, 1, K) of a convolution that runs over each channel by itself."""
    return x.squeeze(1)


def halves(x: Tensor) -> Tensor:
    """Gates and values that alternate in the last dimension, as two halves."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def transposed_halves(x: Tensor) -> Tensor:
    return halves(x).mT


def turned(n_heads: int, head_dim: int, turning: int) -> Callable[[Tensor], Tensor]:
    """Rows of heads whose last `turning` elements turn as pairs of neighbours, as pairs of halves."""

    def form(x: Tensor) -> Tensor:
        heads = x[: n_heads * head_dim].unflatten(0, (n_heads, head_dim))
        still, pairs = heads.split((head_dim - turning, turning), dim=1)
        heads = torch.cat((still, pairs[:, ::2], pairs[:, 1::2]), dim=1)
        return torch.cat((heads.flatten(0, 1), x[n_heads * head_dim :]))

    return form


def rows_of(table: list[Row], theirs: Weights, n_layers: int) -> list[Row]:
    """Write out the rows for every layer; together they take every weight of theirs once."""
    found = []
    for ours, names, form in table:
        for i in range(n_layers if "{}" in ours else 1):
            written = tuple(name.format(i) for name in names)
            if all(name in theirs for name in written):
                found.append((ours.format(i), written, form))
    taken = [name for _, names, _ in found for name in names]
    assert sorted(taken) == sorted(theirs)
    return found


def to_ours(rows: list[Row], theirs: Weights) -> Weights:
    return {name: form(*(theirs[n] for n in names)) for name, names, form in rows}


def to_theirs(rows: list[Row], ours: Weights, shapes: Weights) -> Weights:
    """Return the weights of which `to_ours` makes `ours`, in the shapes of `shapes`."""
    found: Weights = {}
    for name, names, form in rows:
        sizes = [shapes[n].numel() for n in names]
        numbers = torch.arange(sum(sizes)).split(sizes)
        places = form(*(x.view(shapes[n].shape) for x, n in zip(numbers, names, strict=True)))
        flat = torch.empty(sum(sizes))
        flat[places.flatten()] = ours[name].flatten()
        for part, n in zip(flat.split(sizes), names, strict=True):
            found[n] = part.view(shapes[n].shape)
    return found
