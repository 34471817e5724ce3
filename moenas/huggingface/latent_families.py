"""Families of latent attention with temperatures, indexers, and norms of some parts."""

from __future__ import annotations

from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.parts import groups, latent_attention, rope, rope_section, router
from moenas.huggingface.parts import moe as mixture
from moenas.huggingface.softmax_families import Model, biased_experts, with_first_dense
from moenas.records import Plain


def axk1(c: Config) -> Model:
    """A.X K1: DeepSeek-V3 with a norm of the output of each mixture."""
    c.expect("attention_bias", False)
    mixer = latent_attention(c, rope(c))
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    whole, blocks = with_first_dense(c, [mixer] * c.whole("num_hidden_layers"), experts)
    return whole, [
        block | {"ffn_norm": "sandwich"} if block["ffn"]["kind"] == "moe" else block
        for block in blocks
    ]


def mistral4(c: Config) -> Model:
    """Mistral Small 4: softmax scores, and a temperature of late positions."""
    c.expect("attention_bias", False)
    scaling = rope_section(c)
    tempered: Plain = {}
    if beta := scaling.number("llama_4_scaling_beta"):
        length = scaling.whole("original_max_position_embeddings")
        tempered = {"floor_scale": length, "attn_scale": beta, "floor_offset": 0}
    positions = rope(c, elsewhere=("llama_4_scaling_beta", "original_max_position_embeddings"))
    positions.pop("partial_rotary_factor", None)  # the share of qk_rope_head_dim in a head
    mixer = latent_attention(c, positions, **tempered)
    route = router(
        c,
        normalize=c.flag("norm_topk_prob", True),
        scale=c.number("routed_scaling_factor", 1.0),
        **groups(c, "top2_sum"),
    )
    shared = c.whole_or_none("n_shared_experts") or 0
    width = "moe_intermediate_size"
    experts = mixture(c, "n_routed_experts", width, route, n_shared_experts=shared)
    return with_first_dense(c, [mixer] * c.whole("num_hidden_layers"), experts)


FAMILIES: dict[str, Callable[[Config], Model]] = {"axk1": axk1, "mistral4": mistral4}
