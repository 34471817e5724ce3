"""The models and the text that groups measure with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from gpu.card import DEVICE, sized
from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.model.architecture import Architecture, Model
from moenas.space.sections import Recipe


@dataclass(frozen=True)
class Shape:
    """A model of attention with heads of 64, and mixtures of experts; none: dense layers."""

    d_model: int
    layers: int
    n_experts: int
    top_k: int
    width: int
    """Of an expert, or of the dense layer."""

    @property
    def name(self) -> str:
        """Return its name in figures: d512 L8 E64k8."""
        ffn = f"E{self.n_experts}k{self.top_k}" if self.n_experts else "dense"
        return f"d{self.d_model} L{self.layers} {ffn}"

    def architecture(self, **router: Any) -> Architecture:
        """Return the architecture, in a tiny size without a GPU."""
        tiny = replace(self, d_model=64, layers=2, n_experts=min(self.n_experts, 4), width=32)
        shape = sized(self, tiny)
        ffn: dict[str, Any] = {"kind": "dense", "d_ff": shape.width}
        if shape.n_experts:
            routed = {"top_k": min(shape.top_k, shape.n_experts), **router}
            ffn = {"kind": "moe", "n_experts": shape.n_experts, "d_expert": shape.width}
            ffn["router"] = routed
        heads = max(1, shape.d_model // 256)
        mixer = {"kind": "attention", "head_dim": 64, "n_kv_heads": heads}
        block = {"repeat": shape.layers, "mixer": mixer, "ffn": ffn}
        return Architecture.parse({"vocab_size": 256, "d_model": shape.d_model, "blocks": [block]})

    def build(self, seed: int = 0, **router: Any) -> Model:
        """Build the model on the device, in training mode."""
        return self.architecture(**router).build(DEVICE, seed).train()


D256 = Shape(256, 8, 16, 2, 256)
D256_SMALL = Shape(256, 4, 8, 2, 256)
D512 = Shape(512, 8, 64, 8, 128)
D1024 = Shape(1024, 12, 64, 8, 256)
DENSE = Shape(512, 4, 0, 0, 1024)


@cache
def corpus() -> Corpus:
    """Return the text of the standard library: every Python has it."""
    return load({"kind": "stdlib"})


def recipe(steps: int, context: int, batch: int = 16, **more: Any) -> Recipe:
    """Return a run of some steps in bfloat16; `context` is that on a GPU."""
    batch, context = sized((batch, context), (2, 16))
    values: dict[str, Any] = {"lr": 1e-3, "dtype": "bfloat16", "val_tokens": 256, **more}
    return Recipe(tokens=steps * batch * context, context=context, batch=batch, **values)


def tokens(batch: int, context: int, seed: int = 0) -> torch.Tensor:
    """Draw tokens (batch, context) on the device; the shape is that on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, sized((batch, context), (2, 16)), generator=generator).to(DEVICE)
