"""The head of a language model: from the stream to logits, and to their cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.model.layers.cross_entropy import Shape, cross_entropy_by_pieces
from moenas.model.layers.linear import on_cuda

# Shapes: B sequences of S tokens, D model width, V tokens of the vocabulary.

MANY_LOGITS = 1 << 22
"""From this many on (16 MiB) a loss makes its logits by pieces; fewer are faster at once."""


class Head(nn.Module):
    """The way out: `(x W^T + bias) * multiplier`, soft-capped; W is the embedding if tied."""

    matrices = ("weight",)

    def __init__(
        self,
        vocab_size: int,
        d_model: int | None,
        biased: bool,
        multiplier: float,
        softcap: float | None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = d_model  # None if the head is the embedding table
        self.biased = biased
        self.multiplier = multiplier
        self.softcap = softcap
        empty = None if d_model is None else torch.empty(vocab_size, d_model)
        self.weight = None if empty is None else nn.Parameter(empty)
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if biased else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, S, D) to float32 logits (B, S, V)."""
        weight = embedding if self.weight is None else self.weight
        bias = None if self.bias is None else self.bias.to(x.dtype)
        logits = F.linear(x, weight.to(x.dtype), bias).float()
        logits = logits if self.multiplier == 1 else logits * self.multiplier
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def loss(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of (B, S, D) in nats a token.

        Many logits are made and used by pieces of tokens. This takes the memory of one piece, in
        the same time: on a CPU in float32, from torch 2.13 on.
        """
        many = targets.numel() * self.vocab_size >= MANY_LOGITS
        if on_cuda(x):
            return self.loss_on_cuda(x, embedding, targets, many)
        plain = self.multiplier == 1 and self.softcap is None
        plain = plain and hasattr(nn, "LinearCrossEntropyOptions")
        if not (plain and many and x.dtype == torch.float32 and x.device.type == "cpu"):
            return F.cross_entropy(self(x, embedding).flatten(0, 1), targets.flatten())
        return F.linear_cross_entropy(
            x.flatten(0, 1),
            (embedding if self.weight is None else self.weight).float(),
            targets.flatten(),
            linear_bias=None if self.bias is None else self.bias.float(),
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=1024,
                chunking_method=None,
                acc_policy="accurate",
                allow_retain_graph=True,
            ),
        )

    def loss_on_cuda(self, x: Tensor, embedding: Tensor, targets: Tensor, many: bool) -> Tensor:
        """Return the loss, by pieces in every type if there are many logits."""
        if not many:
            return F.cross_entropy(self(x, embedding).flatten(0, 1), targets.flatten())
        weight, shape = embedding, Shape(self.multiplier, self.softcap)
        weight = weight if self.weight is None else self.weight
        return cross_entropy_by_pieces(x.flatten(0, 1), weight, self.bias, targets.flatten(), shape)
