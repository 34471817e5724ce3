"""Small architectures of any blocks, tokens for them, and the norm that they are computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moenas.model.architecture import Architecture
from moenas.records import Plain


def parse(*blocks: Plain, **fields: Any) -> Architecture:
    return Architecture.parse({"vocab_size": 30, "d_model": 16, "blocks": list(blocks), **fields})


def tokens(length: int = 12) -> Tensor:
    return torch.randint(30, (2, length), generator=torch.Generator().manual_seed(0))


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    """An RMSNorm with weights of 1."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
