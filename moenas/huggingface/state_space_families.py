"""Families with layers of a state space: Granite 4.0, Jamba and Nemotron-H."""

from __future__ import annotations

import math
from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.hybrid_families import LINEAR, NO_POSITIONS
from moenas.huggingface.parts import (
    attention,
    biased_router,
    dense,
    groups,
    moe,
    rope,
    router,
    whole_model,
)
from moenas.huggingface.softmax_families import Model, every_layer, granite_factors
from moenas.records import Plain

STATE_SPACE = {"mamba": True, "attention": False, **LINEAR}
"""Words of `layer_types` -> whether such a layer is a state space."""
INFINITE = ({"__float__": "Infinity"}, "Infinity")
"""Spellings of infinity in a configuration."""
ANY_STEP = [[low, high] for low in (0.0, 0) for high in INFINITE]
"""Limits of the time steps of a state space that limit nothing."""


def granitemoehybrid(c: Config) -> Model:
    """Granite 4.0: Mamba-2 layers, and a few of attention, mostly without positions."""
    n = c.whole("num_hidden_layers")
    types = c.kinds("layer_types", n, STATE_SPACE) or [True] * n
    c.expect("position_embedding_type", "rope", "nope", None)
    named = c.get("position_embedding_type")
    positions = rope(c)
    bias = c.flag("attention_bias") or None
    full = attention(
        c,
        positions if named == "rope" else NO_POSITIONS,
        scale=c.number("attention_multiplier"),
        qkv_bias=bias,
        out_bias=bias,
    )
    eps = c.number("rms_norm_eps")
    c.expect("time_step_limit", None, *ANY_STEP)
    state: Plain = {
        "kind": "mamba2",
        "n_heads": c.whole("mamba_n_heads"),
        "head_dim": _mamba_head(c),
        "d_state": c.whole("mamba_d_state"),
        "n_state_groups": c.whole("mamba_n_groups", 1),
        "d_conv": c.whole("mamba_d_conv"),
        "conv_bias": c.flag("mamba_conv_bias", True),
        "proj_bias": c.flag("mamba_proj_bias"),
        "inner_eps": eps,
    }
    shared: Plain = {"n_shared_experts": 1, "d_shared": c.whole("shared_intermediate_size")}
    if c.whole("num_local_experts"):
        route = router(c, normalize=True)
        ffn = moe(c, "num_local_experts", "intermediate_size", route, **shared)
    else:
        c.read |= {"intermediate_size", "num_experts_per_tok"}
        ffn = dense(c, "shared_intermediate_size")
    mixers = [state if is_state else full for is_state in types]
    return whole_model(c, **granite_factors(c)), every_layer(c, mixers, ffn)


def _mamba_head(c: Config) -> int:
    c.read.add("mamba_d_head")
    given = c.get("mamba_d_head")
    width = c.whole("mamba_expand", 2) * c.whole("hidden_size")
    if isinstance(given, int) and "mamba_d_head" in c.fields:
        return given
    return width // c.whole("mamba_n_heads")


def jamba(c: Config) -> Model:
    """Jamba: Mamba layers, attention and experts, each at its period."""
    n = c.whole("num_hidden_layers")
    c.read.add("num_logits_to_keep")
    full = attention(c, NO_POSITIONS)
    rank = c.get("mamba_dt_rank") if "mamba_dt_rank" in c.fields else "auto"
    width = c.whole("hidden_size")
    state: Plain = {
        "kind": "mamba",
        "d_inner": c.whole("mamba_expand") * width,
        "d_state": c.whole("mamba_d_state"),
        "dt_rank": math.ceil(width / 16) if rank == "auto" else c.whole("mamba_dt_rank"),
        "d_conv": c.whole("mamba_d_conv"),
        "conv_bias": c.flag("mamba_conv_bias", True),
        "proj_bias": c.flag("mamba_proj_bias"),
        "inner_norm": True,
        "inner_eps": c.number("rms_norm_eps"),
    }
    every, at = c.whole("attn_layer_period"), c.whole("attn_layer_offset")
    period, offset = c.whole("expert_layer_period"), c.whole("expert_layer_offset")
    network, route = dense(c), router(c, normalize=False)
    experts = moe(c, "num_experts", "intermediate_size", route)
    c.read |= {"layer_types", "layers_block_type"}
    return whole_model(c), [
        {
            "mixer": full if i % every == at else state,
            "ffn": experts if i % period == offset and experts["n_experts"] > 1 else network,
        }
        for i in range(n)
    ]


NEMOTRON_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
NEMOTRON_WORDS = {
    **dict.fromkeys(("mamba", "linear_attention"), "mamba"),
    **dict.fromkeys(("attention", "full_attention"), "attention"),
    **{word: word for word in ("moe", "mlp")},
}


def nemotron_h(c: Config) -> Model:
    """Nemotron-H: each layer is one part: Mamba-2, attention, experts or a network."""
    pattern = c.get("hybrid_override_pattern")
    c.read |= {"num_hidden_layers", "expand", "intermediate_size"}
    if isinstance(pattern, str) and c.get("layers_block_type") is None:
        for letter in pattern:
            if letter not in NEMOTRON_LETTERS:
                raise c.no_counterpart("hybrid_override_pattern", letter, NEMOTRON_LETTERS)
        kinds = [NEMOTRON_LETTERS[letter] for letter in pattern]
    else:
        words = c.get("layers_block_type")
        size = len(words) if isinstance(words, list) else 0
        kinds = c.kinds("layers_block_type", size, NEMOTRON_WORDS) or []
    if not kinds:
        raise c.error("layers_block_type", "the field is missing; give a word for each layer")
    c.expect("mlp_hidden_act", "relu2")
    c.expect("mamba_hidden_act", "silu")
    # The family ties nothing, and `use_bias` is its field for the biases of Mamba-2.
    for name in ("attention_bias", "mlp_bias", "mamba_proj_bias", "tie_word_embeddings"):
        c.expect(name, False)
    c.read |= {"sliding_window", "rope_parameters", "rope_theta"}
    eps = c.number("layer_norm_epsilon")
    c.expect("time_step_limit", None, *ANY_STEP)
    state: Plain = {
        "kind": "mamba2",
        "n_heads": c.whole("mamba_num_heads"),
        "head_dim": c.whole("mamba_head_dim"),
        "d_state": c.whole("ssm_state_size"),
        "n_state_groups": c.whole("n_groups"),
        "d_conv": c.whole("conv_kernel"),
        "conv_bias": c.flag("use_conv_bias", True),
        "proj_bias": c.flag("use_bias"),
        "dt_floor": c.number("time_step_min", 0.001),
        "inner_eps": eps,
    }
    blocks: dict[str, Callable[[], Plain]] = {
        "mamba": lambda: {"mixer": state},
        "attention": lambda: {"mixer": attention(c, NO_POSITIONS)},
        "mlp": lambda: {
            "ffn": {"kind": "dense", "d_ff": c.whole("intermediate_size"), "activation": "relu2"}
        },
        "moe": lambda: {"ffn": _nemotron_experts(c)},
    }
    written = {kind: blocks[kind]() for kind in dict.fromkeys(kinds)}
    return whole_model(c, norm_eps="layer_norm_epsilon"), [written[kind] for kind in kinds]


def _nemotron_experts(c: Config) -> Plain:
    scale, normalize = c.number("routed_scaling_factor", 1.0), c.flag("norm_topk_prob", True)
    route = biased_router(c, normalize=normalize, scale=scale, **groups(c, "top2_sum"))
    c.expect("n_shared_experts", 1)  # the code has one network, whatever the field says
    fields: Plain = {
        "activation": "relu2",
        "n_shared_experts": 1,
        "d_shared": c.whole("moe_shared_expert_intermediate_size"),
        "d_latent": c.whole_or_none("moe_latent_size"),
    }
    return moe(c, "n_routed_experts", "moe_intermediate_size", route, **fields)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "granitemoehybrid": granitemoehybrid,
    "jamba": jamba,
    "nemotron_h": nemotron_h,
}
