"""The parts of a model: typed records that count their cost, each with the module it becomes."""

from __future__ import annotations

import warnings
from typing import Any

from moenas.former import RENAMED
from moenas.model.blocks import Block, BlockGroup, ParallelBlock
from moenas.model.feedforward.dense import FFN, DenseFFN, FeedForward, SigmoidGatedFeedForward
from moenas.model.feedforward.product_key import ProductKeyFFN, ProductKeys
from moenas.model.layer_inputs import LayerIndexed, LayerInputs, ReadsInputs, SharedKV
from moenas.model.layers.activations import Activation
from moenas.model.layers.linear import Convolution, Linear
from moenas.model.layers.norms import DynamicTanh, GatedNorm, LayerNorm, RMSNorm
from moenas.model.mixers.attention import Attention, AttentionMixer
from moenas.model.mixers.gated_delta import GatedDelta, GatedDeltaMixer, ShortConv, ShortConvMixer
from moenas.model.mixers.kimi_delta import KimiDelta, KimiDeltaMixer
from moenas.model.mixers.latent_attention import LatentAttention, LatentAttentionMixer
from moenas.model.mixers.lightning_attention import LightningAttention, LightningAttentionMixer
from moenas.model.mixers.mamba import Mamba, Mamba2, Mamba2Mixer, MambaMixer
from moenas.model.mixers.mixer import KVCache, Mixer, StateCache
from moenas.model.mixers.position_bias import PositionBias
from moenas.model.mixers.rope_scaling import RopeScaling
from moenas.model.mixers.rotary import Rope, Rotary
from moenas.model.mixers.shared_kv import SharesKV
from moenas.model.mixers.shared_kv_attention import CrossLayerAttention
from moenas.model.mixers.softmax_attention import AttentionSpan, SoftmaxAttention
from moenas.model.moe.balance import Balance, LoadBalancer, Routing
from moenas.model.moe.batch_selection import Base, ExpertChoice, Sinkhorn
from moenas.model.moe.experts import Experts, LatentExperts, MoE, MoEFFN, ZeroExperts
from moenas.model.moe.gating import Gating, RoutingDecision
from moenas.model.moe.logits import Logits
from moenas.model.moe.mixture_of_attention import HeadExperts, MoA, MoAMixer
from moenas.model.moe.routed_layer import RoutedLayer
from moenas.model.moe.router import Router
from moenas.model.moe.scores import Score
from moenas.model.moe.selection import ExpertSelection, SelectedSlots, Selection
from moenas.model.residual import ResidualAdd
from moenas.model.shortcut import Shortcut

__all__ = [
    "FFN",
    "Activation",
    "Attention",
    "AttentionMixer",
    "AttentionSpan",
    "Balance",
    "Base",
    "Block",
    "BlockGroup",
    "Convolution",
    "CrossLayerAttention",
    "DenseFFN",
    "DynamicTanh",
    "ExpertChoice",
    "ExpertSelection",
    "Experts",
    "FeedForward",
    "GatedDelta",
    "GatedDeltaMixer",
    "GatedNorm",
    "Gating",
    "HeadExperts",
    "KVCache",
    "KimiDelta",
    "KimiDeltaMixer",
    "LatentAttention",
    "LatentAttentionMixer",
    "LatentExperts",
    "LayerIndexed",
    "LayerInputs",
    "LayerNorm",
    "LightningAttention",
    "LightningAttentionMixer",
    "Linear",
    "LoadBalancer",
    "Logits",
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
    "PositionBias",
    "ProductKeyFFN",
    "ProductKeys",
    "RMSNorm",
    "ReadsInputs",
    "ResidualAdd",
    "Rope",
    "RopeScaling",
    "Rotary",
    "RoutedLayer",
    "Router",
    "Routing",
    "RoutingDecision",
    "Score",
    "SelectedSlots",
    "Selection",
    "SharedKV",
    "SharesKV",
    "ShortConv",
    "ShortConvMixer",
    "Shortcut",
    "SigmoidGatedFeedForward",
    "Sinkhorn",
    "SoftmaxAttention",
    "StateCache",
    "ZeroExperts",
]


def __getattr__(name: str) -> Any:
    """Return a class by its former name, which a stored component of a user may import."""
    if name not in RENAMED:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    message = f"{name} is a former name; write `from moenas.model import {RENAMED[name]}`"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return globals()[RENAMED[name]]
