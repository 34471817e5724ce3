"""Weights between models of transformers and ours, by one small table for each family.

A row names a weight of ours, those of theirs, and how theirs become ours. `{}` stands for the
number of a layer; a row whose weights a layer does not have is left out. Every rule but `from_one`
only moves numbers, so the way back is found by moving their places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Row = tuple[str, tuple[str, ...], Callable[..., Tensor]]
Weights = dict[str, Tensor]


def same(x: Tensor) -> Tensor:
    return x


def from_one(x: Tensor) -> Tensor:
    """A weight that is written as its distance from 1."""
    return 1 + x


def first_row(x: Tensor) -> Tensor:
    return x[0]


def first_transposed(n: int) -> Callable[[Tensor], Tensor]:
    """The first n matrices of a stack; the others are never read."""
    return lambda x: x[:n].mT


def stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def transposed(x: Tensor) -> Tensor:
    return x.mT


def stacked_transposed(*matrices: Tensor) -> Tensor:
    """A matrix for each expert, as one stack of them, (in, out) each."""
    return torch.stack(matrices).mT


def squeezed(x: Tensor) -> Tensor:
    """The kernels (C, 1, K) of a convolution that runs over each channel by itself."""
    return x.squeeze(1)


def halves(x: Tensor) -> Tensor:
    """Gates and values that alternate in the last dimension, as two halves."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def turned(n_heads: int, head_dim: int, turning: int) -> Callable[[Tensor], Tensor]:
    """Rows of heads whose last `turning` elements turn as pairs of neighbours, as pairs of halves."""

    def form(x: Tensor) -> Tensor:
        heads = x[: n_heads * head_dim].unflatten(0, (n_heads, head_dim))
        still, pairs = heads.split((head_dim - turning, turning), dim=1)
        heads = torch.cat((still, pairs[:, ::2], pairs[:, 1::2]), dim=1)
        return torch.cat((heads.flatten(0, 1), x[n_heads * head_dim :]))

    return form


def rows_of(table: list[Row], theirs: Weights, n_layers: int) -> list[Row]:
    """Write out the rows for every layer; together they take every weight of theirs."""
    rows = []
    for ours, names, form in table:
        for i in range(n_layers if "{}" in ours else 1):
            written = tuple(name.format(i) for name in names)
            if all(name in theirs for name in written):
                rows.append((ours.format(i), written, form))
    assert {name for _, names, _ in rows for name in names} == set(theirs)
    return rows


def to_ours(rows: list[Row], theirs: Weights) -> Weights:
    return {name: form(*(theirs[n] for n in names)) for name, names, form in rows}


def to_theirs(rows: list[Row], ours: Weights, shapes: Weights) -> Weights:
    """Return the weights of which `to_ours` makes `ours`, in the shapes of `shapes`.

    Numbers that no row takes are NaN.
    """
    weights = {n: torch.full_like(x, torch.nan).flatten() for n, x in shapes.items()}
    for name, names, form in rows:
        if form is from_one:
            weights[names[0]] = ours[name] - 1
            continue
        sizes = [shapes[n].numel() for n in names]
        numbers = torch.arange(sum(sizes)).split(sizes)
        places = form(*(x.view(shapes[n].shape) for x, n in zip(numbers, names, strict=True)))
        flat = torch.cat([weights[n] for n in names])
        flat[places.flatten()] = ours[name].flatten()
        weights |= zip(names, flat.split(sizes), strict=True)
    return {n: x.view(shapes[n].shape) for n, x in weights.items()}
