"""Families of softmax attention whose layers differ in window, positions and heads."""

from __future__ import annotations

from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.parts import (
    BESIDE,
    attention,
    biased_router,
    check_positions,
    dense,
    groups,
    moe,
    refuse_beside,
    rope,
    router,
    softcap,
    whole_model,
)
from moenas.huggingface.softmax_families import (
    SLIDING,
    SPARSE,
    Model,
    every_layer,
    granite_factors,
    is_sparse,
    listed_sparse,
    mixed_layers,
    qwen_sparse,
)
from moenas.records import Plain

NO_POSITIONS: Plain = {"partial_rotary_factor": 0.0}
GATES = {True: "head", False: "element", "per-head": "head", "per-element": "element"}
"""`gating` of Laguna -> what has a gate of its own."""


def sliding(c: Config, n_layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Return which layers have a window: by `layer_types`, or by a rule of the family."""
    return c.kinds("layer_types", n_layers, SLIDING) or [default(i) for i in range(n_layers)]


def mixers_by_kind(
    c: Config, types: list[bool], mixer: Callable[[str, int | None], Plain], *, null: bool = False
) -> list[Plain]:
    """Return the mixer of each layer, built by the name of its kind and its window.

    The positions of a kind are those of its object in `rope_parameters` alone.
    """
    names = {word: kind for kind, word in SLIDING.items()}
    window = c.whole_or_none("sliding_window")
    refuse_beside(c, *BESIDE)
    check_positions(c, [names[one] for one in types], null=null)
    c.read.add("rope_parameters")
    built = {one: mixer(names[one], window if one else None) for one in set(types)}
    return [built[one] for one in types]


def normed_heads(c: Config, *, bias: bool = True) -> Plain:
    """Return norms of queries and keys by head, and the biases of `attention_bias`."""
    biased = (c.flag("attention_bias") or None) if bias else None
    eps = c.number("rms_norm_eps")
    return {"qk_norm": "head", "inner_eps": eps, "qkv_bias": biased, "out_bias": biased}


def beside_shared(c: Config, n_experts: str, route: Plain) -> Plain:
    """Return a mixture with one shared expert of a width of its own."""
    width = c.whole("shared_expert_intermediate_size")
    return moe(c, n_experts, "moe_intermediate_size", route, n_shared_experts=1, d_shared=width)


def local_positions(c: Config, types: list[bool], **fields: object) -> list[Plain]:
    """Return mixers of which those with a window alone have positions."""
    local = attention(c, rope(c), window=c.whole("sliding_window"), **fields)
    full = attention(c, NO_POSITIONS, **fields)
    return [local if one else full for one in types]


def exaone_moe(c: Config) -> Model:
    """K-EXAONE: DeepSeek-V3's experts, and positions in layers with a window alone."""
    n = c.whole("num_hidden_layers")
    pattern = c.get("sliding_window_pattern", 4)
    if type(pattern) is not int or pattern < 1:
        raise c.no_counterpart("sliding_window_pattern", pattern, ["a whole number"])
    types = sliding(c, n, lambda i: (i + 1) % pattern > 0)
    mixers = local_positions(c, types, **normed_heads(c, bias=False))
    scale, normalize = c.number("routed_scaling_factor"), c.flag("norm_topk_prob", True)
    selection = groups(c, "top2_sum")
    route = biased_router(c, normalize=normalize, scale=scale, **selection)
    shared = c.whole_or_none("num_shared_experts") or 0
    width = "moe_intermediate_size"
    experts = moe(c, "num_experts", width, route, n_shared_experts=shared)
    return whole_model(c), mixed_layers(mixers, is_sparse(c, n), experts, dense(c))


def kolibri1(c: Config) -> Model:
    """Kolibri 1: a selection bias on the logits, and norms before and after the parts."""
    n = c.whole("num_hidden_layers")
    types = sliding(c, n, lambda i: (i + 1) % 5 > 0)
    mixers = local_positions(c, types, **normed_heads(c, bias=False))
    route = biased_router(c, normalize=c.flag("norm_topk_prob"), bias_on="logits")
    experts = beside_shared(c, "num_local_experts", route)
    return whole_model(c, norm_position="sandwich"), every_layer(c, mixers, experts)


def hy_v3(c: Config) -> Model:
    """Hunyuan 3: queries and keys normed by head, and scores with a selection bias."""
    n = c.whole("num_hidden_layers")
    c.expect("mlp_bias", False)
    mixer = attention(c, rope(c), **normed_heads(c))
    route = biased_router(c, normalize=True, scale=c.number("router_scaling_factor"))
    shared = c.whole_or_none("num_shared_experts") or 0
    if not shared:  # the family builds a shared network of intermediate_size then
        raise c.no_counterpart("num_shared_experts", shared, ["1 or more"])
    width = "moe_intermediate_size"
    experts = moe(c, "num_experts", width, route, n_shared_experts=shared)
    c.read.add("enable_moe_fp32_combine")
    return whole_model(c), mixed_layers([mixer] * n, listed_sparse(c, n), experts, dense(c))


def mellum(c: Config) -> Model:
    """Mellum: layers with a window have positions of their own theta."""
    n = c.whole("num_hidden_layers")
    types = sliding(c, n, lambda i: False)
    fields = normed_heads(c)

    def mixer(kind: str, window: int | None) -> Plain:
        return attention(c, rope(c, kind), window=window, **fields)

    mixers = mixers_by_kind(c, types, mixer)
    route = router(c, normalize=c.flag("norm_topk_prob", True))
    experts = moe(c, "num_local_experts", "moe_intermediate_size", route)
    sparse = c.kinds("mlp_layer_types", n, {"dense": False, "sparse": True}) or [True] * n
    c.read |= {"num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"}
    return whole_model(c), mixed_layers(mixers, sparse, experts, dense(c))


def flint(c: Config) -> Model:
    """Flint: sinks, positions in layers with a window alone, sigmoid scores without a bias."""
    n = c.whole("num_hidden_layers")
    types = sliding(c, n, lambda i: i >= 2 and i % 4 != 1 and i != n - 1)
    fields = normed_heads(c) | {"sinks": True}
    local = attention(c, rope(c), window=c.whole("sliding_window"), **fields)
    full = attention(c, NO_POSITIONS, **fields)
    route = router(c, normalize=c.flag("norm_topk_prob", True), score="sigmoid")
    experts = beside_shared(c, "num_experts", route)
    mixers = [local if one else full for one in types]
    return whole_model(c), mixed_layers(mixers, qwen_sparse(c, n), experts, dense(c))


def laguna(c: Config) -> Model:
    """Laguna: softplus gates, and numbers of heads and positions by the kind of the layer."""
    n = c.whole("num_hidden_layers")
    types, usual = sliding(c, n, lambda i: False), c.whole("num_attention_heads")
    heads = c.get("num_attention_heads_per_layer") or [usual] * n
    if not isinstance(heads, list) or len(heads) != n:
        raise c.error("num_attention_heads_per_layer", f"give a list of {n} numbers of heads")
    gating = c.get("gating", True)
    if gating not in GATES:
        raise c.no_counterpart("gating", gating, ["true", "per-head", "per-element"])
    gate: Plain = {"output_gate": GATES[gating], "gate_activation": "softplus"}
    fields = normed_heads(c) | gate

    def mixer(kind: str, window: int | None) -> Plain:  # a missing share of the file is 1
        return attention(c, rope(c, kind, kept=()), window=window, **fields)

    c.expect("moe_apply_router_weight_on_input", False)
    cap = c.number("moe_router_logit_softcapping") or None
    route = biased_router(
        c,
        normalize=True,
        scale=c.number("moe_routed_scaling_factor", 1.0),
        **({"logits": {"kind": "linear", "cap": cap}} if cap else {}),
    )
    experts = beside_shared(c, "num_experts", route)
    mixers = [
        one | {"n_heads": n_heads}
        for one, n_heads in zip(mixers_by_kind(c, types, mixer), heads, strict=True)
    ]
    return whole_model(c), mixed_layers(mixers, listed_sparse(c, n), experts, dense(c))


def beam(c: Config) -> Model:
    """Beam: gates with a bias, scores that grow with the position, and a depth scale."""
    n = c.whole("num_hidden_layers")
    types = sliding(c, n, lambda i: (i + 1) % 6 > 0 and i < n - 1)
    fields = normed_heads(c) | {"output_gate": "element", "gate_bias": True}
    tempered: Plain = {"floor_scale": 2048, "attn_scale": 0.1, "scale_growth": "power"}
    positions = c.section("rope_parameters")

    def mixer(kind: str, window: int | None) -> Plain:
        still = not positions.get(kind)
        of_kind = tempered if still else {}
        where = NO_POSITIONS if still else rope(c, kind)
        if not still and "partial_rotary_factor" in where:
            raise c.error("rope_parameters", "the family has no partial_rotary_factor; delete it")
        return attention(c, where, window=window, **fields, **of_kind)

    mixers = mixers_by_kind(c, types, mixer, null=True)
    normalize, scale = c.flag("norm_topk_prob", True), c.number("routed_scaling_factor")
    route = biased_router(c, normalize=normalize, scale=scale, **groups(c, "top2_sum"))
    experts = moe(c, "num_experts", "moe_intermediate_size", route)
    sparse = c.kinds("mlp_layer_types", n, {"dense": False, "sparse": True})
    sparse = sparse or [i >= 3 for i in range(n)]
    whole = whole_model(
        c,
        norm_position="sandwich",
        depth_scale=True,
        logit_softcap=softcap(c),
    )
    return whole, mixed_layers(mixers, sparse, experts, dense(c))


RELEASED_NAMES = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
"""Field of the family in transformers -> its name in `sparse_attention_config` of the release."""


def _read_released_names(c: Config) -> None:
    """Give the fields of the released configuration the names that transformers has for them.

    `sparse_attention_config` and `moe_layer_freq` have a number for each layer: 0 or not.
    """
    c.read |= {"sparse_attention_config", "moe_layer_freq"}
    nested: Plain = c.get("sparse_attention_config") or {}
    if not isinstance(nested, dict):
        raise c.error("sparse_attention_config", "give an object")
    for name, released in RELEASED_NAMES.items():
        if released in nested:
            c.put(name, nested[released], "sparse_attention_config")
    sparse, kinds = nested.get("sparse_attention_freq"), c.get("moe_layer_freq")
    for name, given, source, words in (
        ("layer_types", sparse, "sparse_attention_config", ("full_attention", "minimax_m3_sparse")),
        ("mlp_layer_types", kinds, "moe_layer_freq", ("dense", "sparse")),
    ):
        if given is None or c.get(name) is not None:
            continue
        if not isinstance(given, list):
            raise c.error(source, "give a list of one number for each layer")
        c.put(name, [words[bool(one)] for one in given], source)


def minimax_m3_vl_text(c: Config) -> Model:
    """MiniMax-M3, the text model: some layers select blocks of keys.

    transformers computes the activation from `swiglu_alpha` and `swiglu_limit`, whatever
    `hidden_act` is: "swigluoai" in the released configuration.
    """
    _read_released_names(c)
    n, eps = c.whole("num_hidden_layers"), c.number("rms_norm_eps")
    words = {"full_attention": False, "minimax_m3_sparse": True}
    sparse_layers = c.kinds("layer_types", n, words) or [False] * n
    positions = rope(c)
    turned = c.whole("rotary_dim") if "rotary_dim" in c.fields else None
    if "partial_rotary_factor" not in positions and turned not in (None, c.whole("head_dim")):
        raise c.error(
            "rotary_dim",
            "the family does not read this field; give rope_parameters.partial_rotary_factor",
        )
    mixer = attention(c, positions, qk_norm="head", inner_eps=eps)
    indexer: Plain = {
        "head_dim": c.whole("index_head_dim"),
        "block": c.whole("index_block_size"),
        "top_blocks": c.whole("index_topk_blocks"),
        "local_blocks": c.whole("index_local_blocks"),
    }
    if c.whole("index_n_heads") != mixer["n_kv_heads"] and any(sparse_layers):
        raise c.no_counterpart("index_n_heads", c.get("index_n_heads"), [mixer["n_kv_heads"]])
    mixers = [mixer | ({"block_indexer": indexer} if one else {}) for one in sparse_layers]
    limits: Plain = {"gate_limit": c.number("swiglu_limit"), "up_shift": 1.0}
    limits["gate_alpha"] = c.number("swiglu_alpha")
    route = biased_router(c, normalize=True, scale=c.number("routed_scaling_factor"))
    experts = moe(
        c,
        "num_local_experts",
        "intermediate_size",
        route,
        n_shared_experts=1,
        d_shared=c.whole("shared_intermediate_size"),
        activation="swiglu",
        **limits,
    )
    c.read.add("hidden_act")
    network = {"kind": "dense", "d_ff": c.whole("dense_intermediate_size"), **limits}
    sparse = c.kinds("mlp_layer_types", n, SPARSE) or [True] * n
    return whole_model(c), mixed_layers(mixers, sparse, experts, network)


def granitemoeshared(c: Config) -> Model:
    """Granite MoE with a shared network beside the experts."""
    n = c.whole("num_hidden_layers")
    bias = c.flag("attention_bias") or None
    mixer = attention(
        c, rope(c), scale=c.number("attention_multiplier"), qkv_bias=bias, out_bias=bias
    )
    return whole_model(c, **granite_factors(c)), every_layer(c, [mixer] * n, _granite_experts(c))


def granitemoe_swa(c: Config) -> Model:
    """Granite MoE with sinks, windows, and a theta of each layer; a theta of 0 is no position."""
    n = c.whole("num_hidden_layers")
    types = sliding(c, n, lambda i: i % 4 > 0)
    bias, window = c.flag("attention_bias") or None, c.whole_or_none("sliding_window")
    positions = rope(c)
    thetas = c.get("layer_rope_theta") if "layer_rope_theta" in c.fields else None
    c.read.add("layer_rope_theta")
    thetas = thetas or [positions["theta"]] * n
    if not isinstance(thetas, list) or len(thetas) != n:
        raise c.error("layer_rope_theta", f"give a list of {n} numbers")
    mixers = [
        attention(
            c,
            positions | {"theta": float(theta)} if theta else NO_POSITIONS,
            scale=c.number("attention_multiplier"),
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
            window=window if one else None,
        )
        for one, theta in zip(types, thetas, strict=True)
    ]
    return whole_model(c, **granite_factors(c)), every_layer(c, mixers, _granite_experts(c))


def _granite_experts(c: Config) -> Plain:
    shared = c.whole_or_none("shared_intermediate_size") or 0
    beside: Plain = {"n_shared_experts": 1, "d_shared": shared} if shared else {}
    route = router(c, normalize=True)
    return moe(c, "num_local_experts", "intermediate_size", route, **beside)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "exaone_moe": exaone_moe,
    "kolibri1": kolibri1,
    "hy_v3": hy_v3,
    "mellum": mellum,
    "flint": flint,
    "laguna": laguna,
    "beam": beam,
    "minimax_m3_vl_text": minimax_m3_vl_text,
    "granitemoeshared": granitemoeshared,
    "granitemoe_swa": granitemoe_swa,
}
