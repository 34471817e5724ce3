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


def indexer(c: Config) -> Plain:
    """Return the token indexer of DeepSeek-V3.2."""
    return {
        "n_heads": c.whole("index_n_heads"),
        "head_dim": c.whole("index_head_dim"),
        "top_k": c.whole("index_topk"),
    }


def deepseek_v32(c: Config) -> Model:
    """DeepSeek-V3.2: each token reads the tokens that an indexer selects."""
    n = c.whole("num_hidden_layers")
    c.expect("attention_bias", False)
    c.expect("mlp_bias", False)
    c.kinds("layer_types", n, {"indexed_attention": True})
    mixer = latent_attention(c, rope(c), indexer=indexer(c))
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return with_first_dense(c, [mixer] * n, experts)


def glm_moe_dsa(c: Config) -> Model:
    """GLM-5: DeepSeek-V3.2 with an indexer in every layer; layers that share one are refused."""
    c.kinds("indexer_types", c.whole("num_hidden_layers"), {"full": True})
    for name in ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"):
        if name in c.fields and "indexer_types" not in c.fields and c.get(name) not in (None, 1):
            raise c.no_counterpart(name, c.get(name), [1])
        c.read.add(name)
    return deepseek_v32(c)


DOTS_KINDS = {
    "indexed_attention": "indexed",
    "full_attention": "full",
    "sliding_attention": "local",
}
DOTS_SIZES = {
    "n_heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
}
"""Field of latent attention -> field of dots 3 that `per_layer_config` can change."""


def dots3_note(c: Config) -> Model:
    """dots 3 Note, the text model: indexed layers, and layers with a window of other sizes."""
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    c.expect("attention_bias", False)
    c.expect("mlp_bias", False)
    kinds = c.kinds("layer_types", n, DOTS_KINDS)
    if kinds is None:
        raise c.error("layer_types", "the field is missing; give a list of one word for each layer")
    changes = c.get("per_layer_config") or {}
    if not isinstance(changes, dict):
        raise c.error("per_layer_config", "give an object of objects by the numbers of layers")
    c.read |= {"swa_rope_theta", "head_dim", "shared_experts_intermediate_size"}
    fields: Plain = {"inner_eps": eps, "rank_scale": True, "output_gate": "head", "rope_norm": True}
    mixers = []
    for i, kind in enumerate(kinds):
        name = {word: key for key, word in DOTS_KINDS.items()}[kind]
        positions = rope(c, name, elsewhere=("partial_rotary_factor",))
        positions.pop("partial_rotary_factor", None)  # the share of qk_rope_head_dim in a head
        more: Plain = {"indexer": indexer(c)} if kind == "indexed" else {}
        if kind == "local":
            more = {"window": c.whole("sliding_window")}
        mixer = latent_attention(c, positions, kind=name, **fields, **more)
        of_layer: Plain = next((x for key, x in changes.items() if int(key) == i), {})
        for ours, theirs in DOTS_SIZES.items():
            if theirs in of_layer:
                mixer[ours] = of_layer[theirs]
        mixers.append(mixer)
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    experts["d_shared"] = c.whole("shared_experts_intermediate_size")
    return with_first_dense(c, mixers, experts)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "axk1": axk1,
    "mistral4": mistral4,
    "deepseek_v32": deepseek_v32,
    "glm_moe_dsa": glm_moe_dsa,
    "dots3_note_text": dots3_note,
}
