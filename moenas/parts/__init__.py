"""The parts of a model: typed records that count their cost, each with the module it becomes."""

from __future__ import annotations

from moenas.parts.activations import Activation
from moenas.parts.attention import Attend, Attention, AttentionMixer
from moenas.parts.balance import Balance, Routing
from moenas.parts.blocks import Block, BlockGroup
from moenas.parts.experts import Experts, LatentExperts, MoE, MoEFFN, ZeroExperts
from moenas.parts.ffn import FFN, DenseFFN, FeedForward, GatedFeedForward
from moenas.parts.gating import Choice, Gating
from moenas.parts.latent import LatentAttention, LatentAttentionMixer
from moenas.parts.layers import Convolution, Linear
from moenas.parts.linear import GatedDelta, GatedDeltaMixer, ShortConv, ShortConvMixer
from moenas.parts.mixers import KVCache, Mixer, Rotary, StateCache
from moenas.parts.norms import DynamicTanh, GatedNorm, LayerNorm, RMSNorm
from moenas.parts.product_key import ProductKeyFFN, ProductKeys
from moenas.parts.routers import Router
from moenas.parts.ssm import Mamba, Mamba2, Mamba2Mixer, MambaMixer

__all__ = [
    "FFN",
    "Activation",
    "Attend",
    "Attention",
    "AttentionMixer",
    "Balance",
    "Block",
    "BlockGroup",
    "Choice",
    "Convolution",
    "DenseFFN",
    "DynamicTanh",
    "Experts",
    "FeedForward",
    "GatedDelta",
    "GatedDeltaMixer",
    "GatedFeedForward",
    "GatedNorm",
    "Gating",
    "KVCache",
    "LatentAttention",
    "LatentAttentionMixer",
    "LatentExperts",
    "LayerNorm",
    "Linear",
    "Mamba",
    "Mamba2",
    "Mamba2Mixer",
    "MambaMixer",
    "Mixer",
    "MoE",
    "MoEFFN",
    "ProductKeyFFN",
    "ProductKeys",
    "RMSNorm",
    "Rotary",
    "Router",
    "Routing",
    "ShortConv",
    "ShortConvMixer",
    "StateCache",
    "ZeroExperts",
]
