"""What the tests of indexers share: latent attention, a text, and models with drawn weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moenas.model.architecture import Architecture, Model
from moenas.records import Plain

LATENT: Plain = {"kind": "latent_attention", "n_heads": 2, "q_rank": 6, "kv_rank": 5}
LATENT |= {"nope_dim": 8, "rope_dim": 4, "v_dim": 8}


def tokens(length: int) -> Tensor:
    """Two sequences of a vocabulary of 40."""
    return torch.randint(40, (2, length), generator=torch.Generator().manual_seed(3))


def model_of(one: Architecture) -> Model:
    """A model in evaluation mode, all of whose weights are drawn from one distribution."""
    model = one.build(seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return model.eval()
