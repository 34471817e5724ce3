"""Families that mix kinds of layers: windows, chunks, linear attention; and experts of heads."""

from __future__ import annotations

import math
from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.parts import (
    BESIDE,
    NO_CHOICE,
    attention,
    biased_router,
    check_positions,
    dense,
    groups,
    head_dim,
    latent_attention,
    moe,
    refuse_beside,
    rope,
    router,
    whole_model,
)
from moenas.huggingface.softmax_families import (
    SLIDING,
    Model,
    biased_experts,
    every_layer,
    is_sparse,
    mixed_layers,
)
from moenas.records import Plain

AUX_LOSS: Plain = {"kind": "aux_loss", "coef": 0.001}
"""Auxiliary loss where the configuration has no coefficient."""
LINEAR = {"linear_attention": True, "full_attention": False}
NO_POSITIONS: Plain = {"partial_rotary_factor": 0.0}


def llama4_text(c: Config) -> Model:
    """Llama 4: layers with chunks and positions, and layers that see all without positions."""
    n = c.whole("num_hidden_layers")
    positions, bias = rope(c), c.flag("attention_bias") or None
    norm: Plain = {"qk_norm": "weightless", "inner_eps": c.number("rms_norm_eps")}
    turning: Plain = {"chunk": c.whole_or_none("attention_chunk_size")}
    turning |= norm if c.flag("use_qk_norm", True) else {}
    still: Plain = {}
    if c.get("attn_temperature_tuning"):
        still = {"floor_scale": c.whole("floor_scale"), "attn_scale": c.number("attn_scale")}
    c.read |= {"floor_scale", "attn_scale"}
    interval = c.whole("no_rope_layer_interval", 4)
    turns = c.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(n)]
    if not isinstance(turns, list) or len(turns) != n:
        raise c.error("no_rope_layers", f"give a list of one number for each of the {n} layers")
    types = c.kinds("layer_types", n, {"chunked_attention": True, "full_attention": False})
    if types not in (None, [bool(turn) for turn in turns]):
        raise c.error("layer_types", "other layers have positions by no_rope_layers; give the same")
    fields: Plain = {"qkv_bias": bias, "out_bias": bias}
    mixers = [
        attention(c, positions, **fields, **turning)
        if turn
        else attention(c, NO_POSITIONS, **fields, **still)
        for turn in turns
    ]
    step = c.whole("interleave_moe_layer_step", 1)
    sparse = c.get("moe_layers")
    sparse = list(range(step - 1, n, step)) if sparse is None else sparse
    network = dense(c, "intermediate_size_mlp")
    route = router(c, normalize=False, score="sigmoid", weight_on="input")
    experts = moe(c, "num_local_experts", "intermediate_size", route, n_shared_experts=1)
    return whole_model(c), mixed_layers(mixers, [i in sparse for i in range(n)], experts, network)


def mimo_v2_flash(c: Config) -> Model:
    """MiMo-V2-Flash: layers with a window have sinks; `attention_value_scale` joins the weights."""
    n = c.whole("num_hidden_layers")
    types = c.kinds("layer_types", n, SLIDING)
    types = types or [i > 0 and (i + 1) % 6 > 0 for i in range(n)]
    c.expect("attention_bias", False)
    refuse_beside(c, *BESIDE)
    check_positions(c, [("full_attention", "sliding_attention")[one] for one in types])
    window = c.whole("sliding_window")
    if (before := c.whole_or_none("sliding_window_size")) is not None:  # beside the token itself
        window = before + 1
    local: Plain = {"window": window, "sinks": True}
    wide = c.whole("v_head_dim")
    full = attention(c, rope(c, "full_attention"), v_head_dim=wide)
    heads = c.whole_or_none("swa_num_key_value_heads")
    near = full
    if any(types):
        near = attention(c, rope(c, "sliding_attention"), v_head_dim=wide, **local)
        near["n_kv_heads"] = heads or 2 * full["n_kv_heads"]
    if c.get("attention_value_scale", 1) == 0:  # any other scale is a part of the weights
        raise c.no_counterpart("attention_value_scale", 0, ["a number other than 0"])
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    network = dense(c)
    mixers = [near if sliding else full for sliding in types]
    return whole_model(c), mixed_layers(mixers, is_sparse(c, n), experts, network)


def afmoe(c: Config) -> Model:
    """Trinity: gated attention, norms before and after the parts, local layers with positions."""
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    every = c.whole("global_attn_every_n_layers", 4)
    types = c.kinds("layer_types", n, SLIDING) or [(i + 1) % every > 0 for i in range(n)]
    c.expect("attention_bias", False)
    fields: Plain = {"qk_norm": "head", "inner_eps": eps, "output_gate": "element"}
    local = attention(c, rope(c), window=c.whole("sliding_window"), **fields)
    full = attention(c, NO_POSITIONS, **fields)
    c.expect("score_func", "sigmoid")
    c.expect("route_norm", True)
    route = biased_router(
        c, normalize=True, scale=c.number("route_scale", 1.0), **groups(c, "top2_sum")
    )
    shared = c.whole_or_none("num_shared_experts") or 0
    experts = moe(c, "num_experts", "moe_intermediate_size", route, n_shared_experts=shared)
    network, first = dense(c), c.whole("num_dense_layers")
    whole = whole_model(c, norm_position="sandwich")
    if c.flag("mup_enabled"):
        whole["embedding_multiplier"] = math.sqrt(whole["d_model"])
    mixers = [local if sliding else full for sliding in types]
    return whole, mixed_layers(mixers, [i >= first for i in range(n)], experts, network)


def qwen3_next(c: Config) -> Model:
    """Qwen3-Next and Qwen3.5: gated delta nets, and gated attention in every fourth layer."""
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    every = c.whole("full_attention_interval", 4)
    types = c.kinds("layer_types", n, LINEAR) or [(i + 1) % every > 0 for i in range(n)]
    bias = c.flag("attention_bias")
    if bias:
        raise c.no_counterpart("attention_bias", bias, [False])
    full = attention(c, rope(c), qk_norm="head", inner_eps=eps, output_gate="element")
    linear: Plain = {
        "kind": "gated_delta",
        "n_heads": c.whole("linear_num_value_heads"),
        "n_key_heads": c.whole("linear_num_key_heads"),
        "key_dim": c.whole("linear_key_head_dim"),
        "value_dim": c.whole("linear_value_head_dim"),
        "d_conv": c.whole("linear_conv_kernel_dim", 4),
        "inner_eps": eps,
    }
    c.expect("decoder_sparse_step", 1)
    route = router(c, normalize=c.flag("norm_topk_prob", True))
    experts = moe(
        c,
        "num_experts",
        "moe_intermediate_size",
        route,
        n_shared_experts=1,
        d_shared=c.whole("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    c.read.add("intermediate_size")
    if c.get("mlp_only_layers"):
        raise c.no_counterpart("mlp_only_layers", c.get("mlp_only_layers"))
    mixers = [linear if is_linear else full for is_linear in types]
    return whole_model(c), every_layer(c, mixers, experts)


def lfm2_moe(c: Config) -> Model:
    """LFM2: gated short convolutions, with a few layers of attention."""
    n, eps = c.whole("num_hidden_layers"), c.number("norm_eps")
    known = {"conv": True, "full_attention": False, "linear_attention": True}
    types = c.kinds("layer_types", n, known)
    if types is None:
        raise c.error("layer_types", "the field is missing; give conv or full_attention by layer")
    full = attention(c, rope(c), qk_norm="head", inner_eps=eps)
    bias, width = c.flag("conv_bias"), c.whole("conv_L_cache")
    conv: Plain = {"kind": "short_conv", "bias": bias, "d_conv": width}
    scale, normalize = c.number("routed_scaling_factor", 1.0), c.flag("norm_topk_prob", True)
    c.expect("use_expert_bias", True)
    route = biased_router(c, normalize=normalize, scale=scale)
    experts = moe(c, "num_experts", "moe_intermediate_size", route)
    network, first = dense(c), c.whole("num_dense_layers")
    mixers = [conv if is_conv else full for is_conv in types]
    sparse = [i >= first for i in range(len(types))]
    return whole_model(c, norm_eps="norm_eps"), mixed_layers(mixers, sparse, experts, network)


def minimax(c: Config) -> Model:
    """MiniMax-Text-01: lightning attention and attention, with DeepNorm's factors."""
    n = c.whole("num_hidden_layers")
    types = c.kinds("layer_types", n, LINEAR) or [i % 2 == 1 for i in range(n)]
    positions = rope(c)
    if "rotary_dim" in c.fields:
        positions["partial_rotary_factor"] = c.whole("rotary_dim") / head_dim(c)
    full = attention(c, positions, window=c.whole_or_none("sliding_window"))
    linear: Plain = {
        "kind": "lightning_attention",
        "n_heads": c.whole("num_attention_heads"),
        "head_dim": head_dim(c),
        "slower_by_depth": True,
    }
    experts = moe(c, "num_local_experts", "intermediate_size", router(c, normalize=True))
    skip = c.number("mlp_alpha_factor", 1.0)
    for name in ("full_attn_alpha_factor", "linear_attn_alpha_factor"):
        c.expect(name, skip)
    for name in ("mlp_beta_factor", "full_attn_beta_factor", "linear_attn_beta_factor"):
        c.expect(name, 1)
    whole = whole_model(c, norm_position="post", embedding_norm=True, skip_multiplier=skip)
    return whole, every_layer(c, [linear if x else full for x in types], experts)


def kimi_linear(c: Config) -> Model:
    """Kimi Linear: Kimi delta attention, and latent attention without positions."""
    n = c.whole("num_hidden_layers")
    section = c.section("linear_attn_config")
    listed = section.get("full_attn_layers")
    types = c.kinds("layer_types", n, LINEAR)
    if types is None and isinstance(listed, list):
        types = [i not in listed for i in range(1, n + 1)]
    if types is None:
        types = [(i + 1) % 4 > 0 for i in range(n)]
    width = section.whole("head_dim", c.whole("linear_head_dim"))
    heads = section.whole("num_heads", c.whole("linear_num_heads"))
    kernel = section.whole("short_conv_kernel_size", c.whole("linear_conv_kernel_dim", 4))
    fields: Plain = {"key_dim": width, "value_dim": width, "rank": width}
    eps = c.number("rms_norm_eps")
    linear: Plain = {
        "kind": "kimi_delta",
        "n_heads": heads,
        **fields,
        "d_conv": kernel,
        "inner_eps": eps,
    }
    c.expect("attention_bias", False)
    c.expect("mla_use_nope", True)
    c.expect("moe_router_activation_func", "sigmoid")
    c.read |= {"rope_parameters", "rope_theta", "rope_scaling", "use_grouped_topk"}
    full = latent_attention(c, NO_POSITIONS)
    selection = groups(c, "top2_sum", n="num_expert_group")
    scale = c.number("routed_scaling_factor")
    route = biased_router(
        c,
        top_k="num_experts_per_token",
        normalize=c.flag("moe_renormalize", True),
        scale=scale,
        **selection,
    )
    shared = c.whole("num_shared_experts")
    experts = moe(c, "num_experts", "moe_intermediate_size", route, n_shared_experts=shared)
    network = dense(c)
    mixers = [linear if is_linear else full for is_linear in types]
    c.expect("tie_word_embeddings", False)  # the family ties nothing, whatever the field says
    return whole_model(c), mixed_layers(mixers, is_sparse(c, n), experts, network)


def dbrx(c: Config) -> Model:
    """DBRX: queries, keys and values are cut; LayerNorm without a bias."""
    inner, feed = c.section("attn_config"), c.section("ffn_config")
    heads, width = c.whole("n_heads"), c.whole("d_model")
    positions = rope(c)
    inner.read.add("rope_theta")
    if inner.get("rope_theta") not in (None, positions["theta"]):
        raise inner.error(
            "rope_theta",
            f"the family does not read this field, its theta is {positions['theta']:g}; give"
            " rope_parameters.rope_theta the same value",
        )
    c.expect("tie_word_embeddings", False)
    c.read.add("num_key_value_heads")
    mixer: Plain = {
        "kind": "attention",
        "head_dim": width // heads,
        "n_heads": heads,
        "n_kv_heads": inner.whole("kv_n_heads"),
        "rope": positions,
        "qkv_clip": inner.get("clip_qkv"),
    }
    if feed.get("moe_normalize_expert_weights") != 1:
        raise feed.no_counterpart(
            "moe_normalize_expert_weights", feed.get("moe_normalize_expert_weights"), [1]
        )
    coef = feed.number("moe_loss_weight")
    top_k = feed.whole("moe_top_k")
    if top_k == 1:
        raise feed.error("moe_top_k", NO_CHOICE)
    route: Plain = {
        "top_k": top_k,
        "normalize": None,
        "balance": {"kind": "aux_loss", "coef": coef} if coef else "none",
    }
    experts: Plain = {
        "kind": "moe",
        "n_experts": feed.whole("moe_num_experts"),
        "d_expert": feed.whole("ffn_hidden_size"),
        "router": route,
    }
    whole = {
        "vocab_size": c.whole("vocab_size"),
        "d_model": width,
        "norm": "layernorm",
        "norm_eps": 1e-5,  # that of torch.nn.LayerNorm; the configuration has no field for it
        "tie_embeddings": c.flag("tie_word_embeddings"),
    }
    return whole, [{"mixer": mixer, "ffn": experts}] * c.whole("n_layers")


def jetmoe(c: Config) -> Model:
    """JetMoE: experts of heads, then experts of networks; two blocks a layer."""
    c.expect("activation_function", "silu")
    c.expect("rms_norm_eps", 1e-6)  # that of the norms of the blocks, whatever the field says
    n_kv_heads, top_k = c.whole("num_key_value_heads"), c.whole("num_experts_per_tok")
    coef = c.number("aux_loss_coef")
    balance = {"kind": "aux_loss", "coef": coef} if coef else "none"
    route: Plain = {"top_k": top_k, "normalize": True, "balance": balance}
    if top_k == 1:
        raise c.error("num_experts_per_tok", NO_CHOICE)
    c.expect("num_attention_heads", n_kv_heads * top_k)
    n_experts = c.whole("num_local_experts")
    heads: Plain = {
        "kind": "moa",
        "n_experts": n_experts,
        "head_dim": c.whole("kv_channels"),
        "n_kv_heads": n_kv_heads,
        "rope": rope(c),
        "router": route,
        "out_bias": True,
    }
    networks: Plain = {
        "kind": "moe",
        "n_experts": n_experts,
        "d_expert": c.whole("intermediate_size"),
        "router": route,
        "out_bias": True,
    }
    return whole_model(c), [{"mixer": heads}, {"ffn": networks}] * c.whole("num_hidden_layers")


BAILING_HEAD = 128
"""Width of a head of `BailingHybridConfig` before it sets `head_dim` to `qk_rope_head_dim`."""


def bailing_hybrid(c: Config) -> Model:
    """Ling hybrid: Kimi delta attention with bounded decays, and gated latent attention."""
    n, every = c.whole("num_hidden_layers"), c.whole("layer_group_size", 6)
    types = c.kinds("layer_types", n, LINEAR) or [(i + 1) % every > 0 for i in range(n)]
    heads, kernel = c.whole("num_attention_heads"), c.whole("short_conv_kernel_size")
    width = c.whole("head_dim") if "head_dim" in c.fields else BAILING_HEAD
    width = c.whole_unless_left_out("linear_head_dim", width)
    if c.get("q_lora_rank") is not None:
        raise c.error(
            "q_lora_rank",
            "the family does not read this field: its queries have one matrix; delete the field",
        )
    c.expect("kda_safe_gate", True)
    eps = c.number("rms_norm_eps")
    linear: Plain = {
        "kind": "kimi_delta",
        "n_heads": c.whole_unless_left_out("linear_num_heads", heads),
        "key_dim": width,
        "value_dim": width,
        "d_conv": c.whole_unless_left_out("linear_conv_kernel_dim", kernel),
        "decay_limit": -c.number("kda_lower_bound", -5.0),
        "inner_eps": eps,
    }
    c.expect("attention_bias", False)
    full = latent_attention(c, rope(c), output_gate="head")
    c.read.add("moe_shared_expert_intermediate_size")
    route = biased_router(
        c,
        top_k="num_experts_per_token",
        normalize=c.flag("moe_renormalize", True),
        scale=c.number("routed_scaling_factor", 1.0),
        **groups(c, "top2_sum", n="num_expert_group"),
    )
    shared = c.whole_or_none("num_shared_experts") or 0
    experts = moe(c, "num_experts", "moe_intermediate_size", route, n_shared_experts=shared)
    network = dense(c)
    mixers = [linear if is_linear else full for is_linear in types]
    c.expect("tie_word_embeddings", False)  # the family ties nothing, whatever the field says
    return whole_model(c), mixed_layers(mixers, is_sparse(c, n), experts, network)


def cohere2_moe(c: Config) -> Model:
    """Command A: attention and experts side by side; only layers with a window have positions."""
    n, every = c.whole("num_hidden_layers"), c.whole("sliding_window_pattern", 4)
    types = c.kinds("layer_types", n, SLIDING) or [(i + 1) % every > 0 for i in range(n)]
    c.expect("attention_bias", False)
    c.expect("num_shared_experts", 0)
    c.expect("expert_selection_fn", "softmax")
    c.read |= {"shared_expert_combination_strategy", "first_k_dense_replace"}
    c.expect("rms_norm_eps", None)
    refuse_beside(c, "rope_scaling")
    local = attention(c, rope(c), window=c.whole("sliding_window"))
    full = attention(c, NO_POSITIONS)
    c.read.add("norm_topk_prob")  # of sigmoid scores alone
    route = router(c, normalize=True, balance=dict(AUX_LOSS))
    experts = moe(c, "num_experts", "intermediate_size", route)
    if c.kinds("mlp_layer_types", n, {"sparse": True}) is None:
        c.expect("first_k_dense_replace", None, 0)
    c.read |= {"prefix_dense_sliding_window_pattern"}
    scale = c.number("logit_scale", 1.0)
    whole = whole_model(c, norm_eps="layer_norm_eps", norm="layernorm", logit_multiplier=scale)
    mixers = [local if sliding else full for sliding in types]
    return whole, every_layer(c, mixers, experts, parallel=True)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "llama4_text": llama4_text,
    "mimo_v2_flash": mimo_v2_flash,
    "afmoe": afmoe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "lfm2_moe": lfm2_moe,
    "minimax": minimax,
    "kimi_linear": kimi_linear,
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "bailing_hybrid": bailing_hybrid,
    "cohere2_moe": cohere2_moe,
}
