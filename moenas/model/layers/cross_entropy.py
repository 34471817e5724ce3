"""The cross entropy of a head by pieces of tokens, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: T tokens, P tokens of a piece, D model width, V tokens of the vocabulary.

PIECE = 1 << 26
"""Logits of a piece: 256 MiB in float32."""


class Shape(NamedTuple):
    """What becomes of products z: `c tanh(m z / c)`, or `m z` without a cap."""

    multiplier: float
    softcap: float | None


def cross_entropy_by_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape
) -> Tensor:
    """Return the mean cross entropy of `x` (T, D) with `weight` (V, D), in nats a token.

    Products are made in the type of `x`, all else is float32. Gradients are worked out along with
    the loss, so each piece is made once.
    """
    loss: Tensor = _ByPieces.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, targets, (shape, torch.is_grad_enabled())
    )
    return loss


def piece_length(vocab_size: int) -> int:
    """Return the tokens of a piece: whole tiles of 128 rows, where they are as many."""
    length = max(1, PIECE // vocab_size)
    return length - length % 128 if length > 128 else length


class _ByPieces(torch.autograd.Function):
    """The loss and, in training, its gradients by x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, targets: Tensor, how: tuple[Shape, bool]
    ) -> Tensor:
        shape, trained = how
        wanted = [trained and needed for needed in ctx.needs_input_grad[:3]]
        of_x = torch.empty_like(x) if wanted[0] else None
        of_weight = torch.zeros_like(weight) if wanted[1] else None
        of_bias = torch.zeros_like(bias) if wanted[2] else None
        matrix, added = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        losses, length = [], piece_length(len(weight))
        for begin in range(0, len(x), length):
            rows, correct = x[begin : begin + length], targets[begin : begin + length, None]
            logs, slope = _log_shares(F.linear(rows, matrix, added).float(), shape)
            losses.append(logs.gather(-1, correct).sum())
            if not any(wanted):
                continue
            # Of a logit: its share, less 1 at the correct token; then by the chain rule.
            by_logit = logs.exp_().scatter_add_(-1, correct, -torch.ones_like(logs[:, :1]))
            by_logit = (by_logit * slope / len(x)).to(x.dtype)
            if of_x is not None:
                of_x[begin : begin + length] = by_logit @ matrix
            if of_weight is not None:
                of_weight += by_logit.T @ rows
            if of_bias is not None:
                of_bias += by_logit.sum(dim=0)
        ctx.gradients = (of_x, of_weight, of_bias)
        return -torch.stack(losses).sum() / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if x is None else (x * grad).to(x.dtype) for x in ctx.gradients]
        ctx.gradients = None  # as torch frees what a node has saved
        return *gradients, None, None


def _log_shares(products: Tensor, shape: Shape) -> tuple[Tensor, Tensor | float]:
    """Return the log of each token's share (P, V), and the slope of the logits by the products."""
    logits = products if shape.multiplier == 1 else products * shape.multiplier
    if shape.softcap is None:
        return logits.log_softmax(dim=-1), shape.multiplier
    squashed = (logits / shape.softcap).tanh()
    slope = (1 - squashed.square()) * shape.multiplier
    return (squashed * shape.softcap).log_softmax(dim=-1), slope
