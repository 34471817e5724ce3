"""Scores: the affinity of a token to each expert, from the logits of its router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moenas.grammar.component import Component

# Shapes: T tokens, E experts.


@dataclass(frozen=True, kw_only=True)
class Score(Component):
    """The family of scores: modules (T, E) -> (T, E), at least 0 and rising with the logit."""

    from_logits: ClassVar[bool] = True
    """False: all experts have one score, and the router has no logits."""
    adds_up_to_1: ClassVar[bool] = False
    """The scores of a token add up to 1, whatever its logits."""

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SoftmaxScore(Score, kind="softmax"):
    """e^z_i / sum_j e^z_j, over all experts (arXiv 1701.06538, eq. 2)."""

    adds_up_to_1 = True

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        return Softmax()


class Softmax(nn.Module):
    """Softmax over all experts."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        return logits.softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class SigmoidScore(Score, kind="sigmoid"):
    """1 / (1 + e^-z), each expert for itself (DeepSeek-V3, arXiv 2412.19437, eq. 15)."""

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        return Sigmoid()


class Sigmoid(nn.Module):
    """Sigmoid of each logit."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        return logits.sigmoid()


@dataclass(frozen=True, kw_only=True)
class SqrtSoftplusScore(Score, kind="sqrt_softplus"):
    """sqrt(log(1 + e^z)), each expert for itself (DeepSeek-V4)."""

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        return SqrtSoftplus()


class SqrtSoftplus(nn.Module):
    """Square root of the softplus of each logit."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        return F.softplus(logits).clamp_min(1e-30).sqrt()  # sqrt has no slope at 0


@dataclass(frozen=True, kw_only=True)
class ReluScore(Score, kind="relu"):
    """max(z, 0), each expert for itself (ReMoE, arXiv 2412.14711, eq. 5)."""

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        return Relu()


class Relu(nn.Module):
    """The positive part of each logit."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        return F.relu(logits)


@dataclass(frozen=True, kw_only=True)
class UniformScore(Score, kind="uniform"):
    """1 for every expert, so nothing is learned; for selection: hash (arXiv 2106.04426, eq. 2)."""

    from_logits = False

    def build(self) -> nn.Module:
        """Build the function of the logits."""
        return Uniform()


class Uniform(nn.Module):
    """1 for every expert."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map (T, E) to (T, E)."""
        return torch.ones_like(logits)
