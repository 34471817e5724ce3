"""Families of softmax and latent attention, with dense layers or mixtures of experts.

Each function reads the fields of one family by the meaning that transformers gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from moenas.huggingface.config import Config
from moenas.huggingface.parts import (
    attention,
    biased_router,
    dense,
    groups,
    head_dim,
    inside_or_beside,
    latent_attention,
    moe,
    rope,
    rope_section,
    router,
    whole_model,
)
from moenas.records import Plain

Model: TypeAlias = "tuple[Plain, list[Plain]]"
"""The fields of an architecture beside its blocks, and its blocks, one a layer."""

SLIDING = {"full_attention": False, "sliding_attention": True}
SPARSE = {"dense": False, "sparse": True}


def windows(c: Config, n_layers: int) -> list[int | None]:
    """Return the window of each layer: by `layer_types`, or the same for all layers."""
    types = c.kinds("layer_types", n_layers, SLIDING)
    used = c.flag("use_sliding_window", True)
    window = c.whole_or_none("sliding_window") if used else None
    if not used:  # released files give sizes that have no effect
        c.read |= {"sliding_window", "max_window_layers"}
    if types is not None:
        return [window if sliding else None for sliding in types]
    if c.family in ("qwen2", "qwen3", "qwen2_moe", "dots1"):  # only late layers have a window
        first = (
            c.whole("max_window_layers", n_layers) if "use_sliding_window" in c.fields else n_layers
        )
        return [window if i >= first else None for i in range(n_layers)]
    return [window or None] * n_layers


def is_sparse(c: Config, n_layers: int) -> list[bool]:
    """Return which layers have experts: `mlp_layer_types`, or after the first dense ones."""
    given = c.kinds("mlp_layer_types", n_layers, SPARSE)
    if given is not None:
        c.read |= {"first_k_dense_replace", "moe_layer_freq"}
        return given
    first = c.whole("first_k_dense_replace", 1)
    c.expect("moe_layer_freq", 1)
    return [i >= first for i in range(n_layers)]


def check_first_dense(c: Config, sparse: list[bool]) -> None:
    """Refuse a `first_k_dense_replace` that names other layers, if the family does not read it."""
    if "first_k_dense_replace" not in c.fields:
        return
    first = c.whole_or_none("first_k_dense_replace")
    if first is not None and [i >= first for i in range(len(sparse))] != sparse:
        raise c.error(
            "first_k_dense_replace",
            "the family does not read this field; give mlp_layer_types",
        )


def listed_sparse(c: Config, n_layers: int) -> list[bool]:
    """Return which layers have experts: by `mlp_layer_types`, or all but the first."""
    given = c.kinds("mlp_layer_types", n_layers, SPARSE)
    sparse = given or [i >= 1 for i in range(n_layers)]
    check_first_dense(c, sparse)
    return sparse


def mixed_layers(
    mixers: Iterable[Plain], sparse: Iterable[bool], experts: Plain, network: Plain
) -> list[Plain]:
    """Return a block for each mixer: with the experts where it is sparse, else with the network."""
    return [
        {"mixer": mixer, "ffn": experts if one else network}
        for mixer, one in zip(mixers, sparse, strict=True)
    ]


def every_layer(c: Config, mixers: list[Plain], ffn: Plain, **block: object) -> list[Plain]:
    """Return a block for each mixer, all with the same network."""
    return [{"mixer": mixer, "ffn": ffn, **block} for mixer in mixers]


def llama(c: Config) -> Model:
    """Llama, and Mistral with a window."""
    n = c.whole("num_hidden_layers")
    c.expect("mlp_bias", False)
    bias = c.flag("attention_bias")
    mixers = [
        attention(c, rope(c), qkv_bias=bias or None, out_bias=bias or None, window=window)
        for window in windows(c, n)
    ]
    return whole_model(c), every_layer(c, mixers, dense(c))


def stablelm(c: Config) -> Model:
    """StableLM 2: LayerNorm with a bias, and positions in a part of each head."""
    c.expect("qk_layernorm", False)
    heads = c.whole("num_attention_heads")
    width = c.whole("hidden_size") // heads  # of a head, whatever the file gives
    if c.get("head_dim") not in (None, width):
        raise c.no_counterpart("head_dim", c.get("head_dim"), [width])
    mixer = attention(c, rope(c), qkv_bias=c.flag("use_qkv_bias") or None)
    parallel = {"parallel": True} if c.flag("use_parallel_residual") else {}
    whole = whole_model(c, norm_eps="layer_norm_eps", norm="layernorm_bias")
    return whole, every_layer(c, [mixer] * c.whole("num_hidden_layers"), dense(c), **parallel)


def qwen2(c: Config) -> Model:
    """Qwen2: queries, keys and values have a bias."""
    n = c.whole("num_hidden_layers")
    mixers = [attention(c, rope(c), qkv_bias=True, window=w) for w in windows(c, n)]
    return whole_model(c), every_layer(c, mixers, dense(c))


def _qwen3_mixers(c: Config, n_layers: int) -> list[Plain]:
    eps, bias = c.number("rms_norm_eps"), c.flag("attention_bias") or None
    return [
        attention(
            c, rope(c), qk_norm="head", inner_eps=eps, qkv_bias=bias, out_bias=bias, window=window
        )
        for window in windows(c, n_layers)
    ]


def qwen3(c: Config) -> Model:
    """Qwen3: queries and keys are normed by head."""
    return whole_model(c), every_layer(c, _qwen3_mixers(c, c.whole("num_hidden_layers")), dense(c))


def qwen_sparse(c: Config, n_layers: int) -> list[bool]:
    """Return which layers of a Qwen mixture have experts."""
    step, only = c.whole("decoder_sparse_step", 1), c.get("mlp_only_layers")
    only = c.defaults.get("mlp_only_layers", []) if only is None else only
    if not isinstance(only, list):
        raise c.error("mlp_only_layers", "give a list of numbers of layers")
    return [step > 0 and (i + 1) % step == 0 and i not in only for i in range(n_layers)]


def qwen3_moe(c: Config) -> Model:
    """Qwen3-MoE, with dense layers by `mlp_only_layers` and `decoder_sparse_step`."""
    n = c.whole("num_hidden_layers")
    route = router(c, normalize=c.flag("norm_topk_prob"))
    experts = moe(c, "num_experts", "moe_intermediate_size", route)
    network = dense(c)
    mixers = _qwen3_mixers(c, n)
    sparse = qwen_sparse(c, n)
    return whole_model(c), mixed_layers(mixers, sparse, experts, network)


def qwen2_moe(c: Config) -> Model:
    """Qwen2-MoE: a shared expert behind a gate."""
    n = c.whole("num_hidden_layers")
    bias = c.flag("qkv_bias", True) or None
    shared = {"n_shared_experts": 1, "shared_gate": True}
    route = router(c, normalize=c.flag("norm_topk_prob"))
    d_shared = c.whole("shared_expert_intermediate_size")
    experts = moe(c, "num_experts", "moe_intermediate_size", route, d_shared=d_shared, **shared)
    network = dense(c)
    mixers = [attention(c, rope(c), qkv_bias=bias, window=w) for w in windows(c, n)]
    return whole_model(c), mixed_layers(mixers, qwen_sparse(c, n), experts, network)


def mixtral(c: Config) -> Model:
    """Mixtral: every layer has experts, whose weights add up to 1."""
    n = c.whole("num_hidden_layers")
    experts = moe(c, "num_local_experts", "intermediate_size", router(c, normalize=True))
    mixers = [attention(c, rope(c), window=window) for window in windows(c, n)]
    return whole_model(c), every_layer(c, mixers, experts)


def phimoe(c: Config) -> Model:
    """Phi-3.5-MoE: biases, LayerNorm, and the weights of SparseMixer."""
    n = c.whole("num_hidden_layers")
    jitter = c.number("router_jitter_noise")
    if jitter <= 0:  # the margin of SparseMixer, too
        raise c.no_counterpart("router_jitter_noise", jitter, ["a number above 0"])
    c.expect("num_experts_per_tok", 2)  # the code chooses two, whatever the field says
    route = router(
        c,
        normalize=False,
        selection={"kind": "top_k", "sparsemixer_eps": jitter},
        logits={"kind": "linear", "jitter": jitter},
    )
    bias = c.flag("attention_bias") or None
    experts = moe(c, "num_local_experts", "intermediate_size", route)
    mixers = [
        attention(c, rope(c), qkv_bias=bias, out_bias=bias, window=window)
        for window in windows(c, n)
    ]
    whole = whole_model(c, norm="layernorm_bias", head_bias=c.flag("lm_head_bias"))
    return whole, every_layer(c, mixers, experts)


def olmoe(c: Config) -> Model:
    """OLMoE: queries and keys are normed over all heads together."""
    n = c.whole("num_hidden_layers")
    eps, bias = c.number("rms_norm_eps"), c.flag("attention_bias") or None
    clip = c.get("clip_qkv")
    route = router(c, normalize=c.flag("norm_topk_prob"))
    experts = moe(c, "num_experts", "intermediate_size", route)
    mixer = attention(
        c, rope(c), qk_norm="full", inner_eps=eps, qkv_bias=bias, out_bias=bias, qkv_clip=clip
    )
    if clip is not None:
        raise c.no_counterpart("clip_qkv", clip)
    return whole_model(c), every_layer(c, [mixer] * n, experts)


def flex_olmo(c: Config) -> Model:
    """FlexOlmo: norms are on the outputs of the parts."""
    whole, blocks = olmoe(c)
    return whole | {"norm_position": "output"}, blocks


def granitemoe(c: Config) -> Model:
    """Granite 3.0 MoE: factors of the embedding, the residual, the scores and the logits."""
    n = c.whole("num_hidden_layers")
    bias = c.flag("attention_bias") or None
    experts = moe(c, "num_local_experts", "intermediate_size", router(c, normalize=True))
    mixer = attention(
        c, rope(c), scale=c.number("attention_multiplier"), qkv_bias=bias, out_bias=bias
    )
    return whole_model(c, **granite_factors(c)), every_layer(c, [mixer] * n, experts)


def granite_factors(c: Config) -> Plain:
    """Return the factors of a Granite model; `logits_scaling` divides."""
    return {
        "embedding_multiplier": c.number("embedding_multiplier"),
        "residual_multiplier": c.number("residual_multiplier"),
        "logit_multiplier": 1 / c.number("logits_scaling"),
    }


def gpt_oss(c: Config) -> Model:
    """gpt-oss: sinks, biases and gates with a limit; every second layer has a window."""
    n = c.whole("num_hidden_layers")
    types = c.kinds("layer_types", n, SLIDING) or [i % 2 == 0 for i in range(n)]
    bias, window = c.flag("attention_bias"), c.whole_or_none("sliding_window")
    route = router(c, normalize=True, logits={"kind": "linear", "add_bias": True})
    experts = moe(
        c,
        "num_local_experts",
        "intermediate_size",
        route,
        expert_bias=True,
        gate_limit=c.number("swiglu_limit"),
        gate_alpha=c.number("swiglu_alpha", 1.702),
        up_shift=1.0,
        activation="swiglu",  # whatever hidden_act is
    )
    c.read |= {"hidden_act", "experts_per_token", "initial_context_length", "max_window_layers"}
    fields = {"qkv_bias": bias, "out_bias": bias, "sinks": True}
    mixers = [attention(c, rope(c), window=window if s else None, **fields) for s in types]
    return whole_model(c), every_layer(c, mixers, experts)


def biased_experts(c: Config, n_experts: str, selection: Plain, **fields: object) -> Plain:
    """Return experts chosen by sigmoid scores with a bias, beside shared ones."""
    c.expect("scoring_func", "sigmoid")
    c.expect("topk_method", "noaux_tc")
    scale, normalize = c.number("routed_scaling_factor", 1.0), c.flag("norm_topk_prob", True)
    route = biased_router(c, normalize=normalize, scale=scale, **selection)
    shared = c.whole_or_none("n_shared_experts") or 0
    return moe(c, n_experts, "moe_intermediate_size", route, n_shared_experts=shared, **fields)


def with_first_dense(c: Config, mixers: list[Plain], experts: Plain) -> Model:
    """Return a model whose first layers are dense."""
    sparse = is_sparse(c, len(mixers))
    network = dense(c) if not all(sparse) else experts
    c.read.add("intermediate_size")
    return whole_model(c), mixed_layers(mixers, sparse, experts, network)


def glm4_moe(c: Config) -> Model:
    """GLM-4.5: a selection bias, and positions in a part of each head."""
    eps, bias = c.number("rms_norm_eps"), c.flag("attention_bias") or None
    norm: Plain = {"qk_norm": "head", "inner_eps": eps} if c.flag("use_qk_norm") else {}
    mixer = attention(c, rope(c), qkv_bias=bias, **norm)
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return with_first_dense(c, [mixer] * c.whole("num_hidden_layers"), experts)


def solar_open(c: Config) -> Model:
    """Solar Open: GLM's experts in every layer."""
    bias = c.flag("attention_bias") or None
    n = c.whole("num_hidden_layers")
    mixer = attention(c, rope(c), qkv_bias=bias)
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return whole_model(c), every_layer(c, [mixer] * n, experts)


def dots1(c: Config) -> Model:
    """dots.llm1: Qwen3's attention and DeepSeek-V3's experts."""
    mixers = _qwen3_mixers(c, c.whole("num_hidden_layers"))
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return with_first_dense(c, mixers, experts)


def deepseek_v3(c: Config) -> Model:
    """DeepSeek-V3, Kimi K2, Moonlight and GLM-4.7-Flash."""
    c.expect("attention_bias", False)
    positions = rope(c)
    if share := positions.get("partial_rotary_factor"):
        raise c.no_counterpart("partial_rotary_factor", share, [1])
    mixer = latent_attention(c, positions)
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return with_first_dense(c, [mixer] * c.whole("num_hidden_layers"), experts)


def deepseek_v2(c: Config) -> Model:
    """DeepSeek-V2: softmax scores, whose weights are scaled and not normalised."""
    c.expect("attention_bias", False)
    c.expect("mlp_bias", False)
    c.expect("scoring_func", "softmax")
    c.expect("norm_topk_prob", False, None)
    c.expect("topk_method", "greedy", "group_limited_greedy")
    limited = c.get("topk_method") == "group_limited_greedy"
    selection = groups(c, "max") if limited else {}
    c.read |= {"n_group", "topk_group"}
    route = router(
        c,
        normalize=False,
        scale=c.number("routed_scaling_factor"),
        balance={
            "kind": "aux_loss",
            "coef": c.number("aux_loss_alpha", 0.001),
            "scope": "sequence",
        },
        **selection,
    )
    shared = c.whole_or_none("n_shared_experts") or 0
    experts = moe(c, "n_routed_experts", "moe_intermediate_size", route, n_shared_experts=shared)
    mixers = [latent_attention(c, rope(c))] * c.whole("num_hidden_layers")
    return with_first_dense(c, mixers, experts)


def longcat_flash(c: Config) -> Model:
    """LongCat-Flash: two blocks a layer, and a mixture that spans both."""
    c.expect("attention_bias", False)
    mixer = latent_attention(c, rope(c), rank_scale=True)
    c.expect("router_bias", False)
    c.expect("zero_expert_type", "identity")
    balance: Plain = {"kind": "bias", "rate": 0.001}
    scale = c.number("routed_scaling_factor")
    route = router(c, top_k="moe_topk", normalize=False, scale=scale, balance=balance)
    zeros = c.whole_or_none("zero_expert_num") or 0
    width = "expert_ffn_hidden_size"
    experts = moe(c, "n_routed_experts", width, route, n_zero_experts=zeros)
    network = dense(c, "ffn_hidden_size")
    c.read.add("mla_scale_q_lora")
    c.read.add("mla_scale_kv_lora")
    first: Plain = {"mixer": mixer, "ffn": network, "shortcut": experts, "shortcut_delay": 1}
    return whole_model(c), [first, {"mixer": mixer, "ffn": network}] * c.whole("num_layers")


def minimax_m2(c: Config) -> Model:
    """MiniMax-M2: norms over all heads, positions in a part of each."""
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    positions = rope(c)
    if "rotary_dim" in c.fields:
        positions["partial_rotary_factor"] = c.whole("rotary_dim") / c.whole("head_dim")
    mixer = attention(c, positions, qk_norm="full", inner_eps=eps)
    route = biased_router(c, normalize=True)
    experts = moe(c, "num_local_experts", "intermediate_size", route)
    c.expect("scoring_func", "sigmoid")
    c.expect("use_qk_norm", True)
    return whole_model(c), every_layer(c, [mixer] * n, experts)


def ernie4_5_moe(c: Config) -> Model:
    """ERNIE 4.5: shared experts as wide as the routed ones, dense layers at either end."""
    n = c.whole("num_hidden_layers")
    c.expect("use_bias", False)
    mixer = attention(c, rope(c))
    start, step = c.whole("moe_layer_start_index"), c.whole("moe_layer_interval")
    end = c.get("moe_layer_end_index") if "moe_layer_end_index" in c.fields else -1
    end = n - 1 if end == -1 else end
    coef = 0.0 if c.is_null("router_aux_loss_coef") else c.number("router_aux_loss_coef", 0.001)
    balance: Plain = {"kind": "bias_and_loss", "coef": coef}
    route = router(c, top_k="moe_k", normalize=True, balance=balance)
    shared = c.whole_or_none("moe_num_shared_experts") or 0
    width = "moe_intermediate_size"
    experts = moe(c, "moe_num_experts", width, route, n_shared_experts=shared)
    network = dense(c)
    c.expect("moe_norm_min", c.defaults["moe_norm_min"])
    return whole_model(c), [
        {"mixer": mixer, "ffn": experts if (i + 1) % step == 0 and start <= i <= end else network}
        for i in range(n)
    ]


def hunyuan_v1_moe(c: Config) -> Model:
    """Hunyuan-A13B: norms after the positions, whose theta grows by `alpha`."""
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    bias = c.flag("attention_bias") or None
    positions = _alpha_rope(c)
    mixer = attention(
        c,
        positions,
        qk_norm="head",
        qk_norm_after_rope=True,
        inner_eps=eps,
        qkv_bias=bias,
        out_bias=bias,
    )
    c.expect("use_qk_norm", True)
    route = router(c, top_k="moe_topk", normalize=True, balance={"kind": "aux_loss", "coef": 0.001})
    experts = moe(c, "num_experts", "intermediate_size", route, n_shared_experts=1)
    return whole_model(c), every_layer(c, [mixer] * n, experts)


def _alpha_rope(c: Config) -> Plain:
    """Return positions whose theta is multiplied by alpha^(d / (d - 2)), d the width of a head."""
    section = rope_section(c)
    kind = section.get("rope_type") or section.get("type")
    if kind != "dynamic" or not section.number("alpha"):
        return rope(c)
    width = head_dim(c)
    theta = inside_or_beside(c, section, "rope_theta", 10000.0)
    c.read |= {"rope_theta", "rope_scaling", "rope_parameters"}
    return {"theta": theta * section.number("alpha") ** (width / (width - 2))}


def aria_text(c: Config) -> Model:
    """Aria's text model: shared experts beside experts whose weights add up to 1."""
    n = c.whole("num_hidden_layers")
    c.expect("mlp_bias", False)
    bias = c.flag("attention_bias") or None
    mixer = attention(c, rope(c), qkv_bias=bias, out_bias=bias)
    balance: Plain = {"kind": "aux_loss", "coef": 0.001}
    route = router(c, top_k="moe_topk", normalize=True, balance=balance)
    shared = c.whole("moe_num_shared_experts")
    experts = moe(c, "moe_num_experts", "intermediate_size", route, n_shared_experts=shared)
    return whole_model(c), every_layer(c, [mixer] * n, experts)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "llama": llama,
    "mistral": llama,
    "stablelm": stablelm,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "phimoe": phimoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "flex_olmo": flex_olmo,
    "granitemoe": granitemoe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": deepseek_v3,
    "solar_open": solar_open,
    "dots1": dots1,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "longcat_flash": longcat_flash,
    "minimax_m2": minimax_m2,
    "ernie4_5_moe": ernie4_5_moe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "aria_text": aria_text,
}
