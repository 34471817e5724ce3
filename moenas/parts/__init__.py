"""The parts of a model: typed records that count their cost, each with the module it becomes."""

from __future__ import annotations

from moenas.parts.activations import Activation
from moenas.parts.assignment import Base, ExpertChoice, Sinkhorn
from moenas.parts.attend import Attend, Reach
from moenas.parts.attention import Attention, AttentionMixer
from moenas.parts.balance import Balance, Routing
from moenas.parts.bias import PositionBias
from moenas.parts.blocks import Block, BlockGroup, ParallelBlock, Shortcut
from moenas.parts.borrowing import BorrowedAttention
from moenas.parts.experts import Experts, LatentExperts, MoE, MoEFFN, ZeroExperts
from moenas.parts.ffn import FFN, DenseFFN, FeedForward, GatedFeedForward
from moenas.parts.gating import Choice, Gating
from moenas.parts.kda import KimiDelta, KimiDeltaMixer
from moenas.parts.latent import LatentAttention, LatentAttentionMixer
from moenas.parts.layers import Convolution, Linear
from moenas.parts.lending import Lending, Lent
from moenas.parts.lightning import LightningAttention, LightningAttentionMixer
from moenas.parts.linear import GatedDelta, GatedDeltaMixer, ShortConv, ShortConvMixer
from moenas.parts.mixers import KVCache, Mixer, StateCache
from moenas.parts.moa import HeadExperts, MoA, MoAMixer
from moenas.parts.norms import DynamicTanh, GatedNorm, LayerNorm, RMSNorm
from moenas.parts.product_key import ProductKeyFFN, ProductKeys
from moenas.parts.residual import Join
from moenas.parts.rotary import RopeScaling, Rotary
from moenas.parts.routers import Router
from moenas.parts.scores import Score
from moenas.parts.selection import ExpertSelection, Picked, Selection
from moenas.parts.ssm import Mamba, Mamba2, Mamba2Mixer, MambaMixer

__all__ = [
    "FFN",
    "Activation",
    "Attend",
    "Attention",
    "AttentionMixer",
    "Balance",
    "Base",
    "Block",
    "BlockGroup",
    "BorrowedAttention",
    "Choice",
    "Convolution",
    "DenseFFN",
    "DynamicTanh",
    "ExpertChoice",
    "ExpertSelection",
    "Experts",
    "FeedForward",
    "GatedDelta",
    "GatedDeltaMixer",
    "GatedFeedForward",
    "GatedNorm",
    "Gating",
    "HeadExperts",
    "Join",
    "KVCache",
    "KimiDelta",
    "KimiDeltaMixer",
    "LatentAttention",
    "LatentAttentionMixer",
    "LatentExperts",
    "LayerNorm",
    "Lending",
    "Lent",
    "LightningAttention",
    "LightningAttentionMixer",
    "Linear",
    "Mamba",
    "Mamba2",
    "Mamba2Mixer",
    "MambaMixer",
    "Mixer",
    "MoA",
    "MoAMixer",
    "MoE",
    "MoEFFN",
    "ParallelBlock",
    "Picked",
    "PositionBias",
    "ProductKeyFFN",
    "ProductKeys",
    "RMSNorm",
    "Reach",
    "RopeScaling",
    "Rotary",
    "Router",
    "Routing",
    "Score",
    "Selection",
    "ShortConv",
    "ShortConvMixer",
    "Shortcut",
    "Sinkhorn",
    "StateCache",
    "ZeroExperts",
]
