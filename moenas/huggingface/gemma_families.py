"""Gemma 4: windows, heads by kind of layer, a mixture beside each dense network, block factors."""

from __future__ import annotations

import math
from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.parts import (
    BESIDE,
    activation,
    attention,
    check_positions,
    layer_changes,
    refuse_beside,
    rope,
    router,
    softcap,
    whole_model,
)
from moenas.huggingface.softmax_families import SLIDING, Model
from moenas.records import Plain

ROUTER_EPS = 1e-6
"""Of the norm of the input of a router, which a space file cannot change."""


def gemma4_text(c: Config) -> Model:
    """Gemma 4 without embeddings of each layer, dense or with a mixture in every layer."""
    if per_layer := c.whole_or_none("hidden_size_per_layer_input"):
        raise c.no_counterpart("hidden_size_per_layer_input", per_layer, [0])
    c.expect("use_bidirectional_attention", None, "vision")  # text alone is read causally
    c.read |= {"vocab_size_per_layer_input", "sliding_window"}
    n, n_shared = c.whole("num_hidden_layers"), c.whole("num_kv_shared_layers", 0)
    types = c.kinds("layer_types", n, SLIDING) or [(i + 1) % 6 > 0 for i in range(n)]
    types = [*types[:-1], False]  # the family makes the last layer one of full attention
    first_shared = n - n_shared
    if n_shared and (first_shared < 0 or set(types[:first_shared]) != set(types)):
        raise c.error(
            "num_kv_shared_layers", f"{n_shared} leaves no layer of each kind with keys of its own"
        )
    refuse_beside(c, *BESIDE)
    names = {word: kind for kind, word in SLIDING.items()}
    check_positions(c, [names[one] for one in types])
    mixers = [_mixer(c, i, types, first_shared) for i in range(n)]
    width = c.whole("intermediate_size")
    wide = 2 if c.flag("use_double_wide_mlp") else 1
    experts = _experts(c)
    blocks: list[Plain] = []
    for i, mixer in enumerate(mixers):
        d_ff = width * (wide if i >= first_shared else 1)
        network = {"kind": "dense", "d_ff": d_ff, **activation(c, "hidden_activation")}
        blocks.append({"mixer": mixer, "ffn": network, "block_scale": True, **experts})
    whole = whole_model(
        c,
        norm_position="sandwich",
        embedding_multiplier=math.sqrt(c.whole("hidden_size")),
        logit_softcap=softcap(c),
    )
    return whole, blocks


def _mixer(c: Config, layer: int, types: list[bool], first_shared: int) -> Plain:
    """Return the mixer of a layer; layers from `first_shared` on read keys of earlier ones."""
    local, bias = types[layer], c.flag("attention_bias") or None
    kind = "sliding_attention" if local else "full_attention"
    fields: Plain = {"qk_norm": "head", "v_norm": True, "scale": 1.0}
    fields |= {"inner_eps": c.number("rms_norm_eps"), "qkv_bias": bias, "out_bias": bias}
    if local:
        fields["window"] = c.whole("sliding_window")
    elif c.flag("attention_k_eq_v"):
        fields["k_eq_v"] = True
    if layer >= first_shared:
        source = max(i for i in range(first_shared) if types[i] == local)
        fields["kv_source"] = first_shared - source
    positions = rope(c, kind, kept=("rope_theta",))
    mixer = attention(c, positions, **fields)
    return mixer | _sizes(c, layer, local)


def _sizes(c: Config, layer: int, local: bool) -> Plain:
    """Return width and key-value heads of a layer where they differ from those of the others."""
    head_dim, kv_heads = c.whole("global_head_dim", 512), None
    if c.flag("attention_k_eq_v"):
        kv_heads = c.whole_or_none("num_global_key_value_heads")
    c.read |= {"head_dim", "num_global_key_value_heads", "per_layer_config"}
    changes: Plain = {} if local else {"head_dim": head_dim, "num_key_value_heads": kv_heads}
    if "per_layer_config" in c.fields:
        names = ("head_dim", "num_key_value_heads")
        changes = layer_changes(c, c.whole("num_hidden_layers"), names).get(layer, {})
    sizes: Plain = {"head_dim": c.whole("head_dim")}
    for name, ours in (("head_dim", "head_dim"), ("num_key_value_heads", "n_kv_heads")):
        if (size := changes.get(name)) is not None:
            sizes[ours] = size
    return sizes


def _experts(c: Config) -> Plain:
    """Return the mixture beside the dense network of a block, or nothing."""
    c.read |= {"num_experts", "top_k_experts", "moe_intermediate_size"}
    if not c.flag("enable_moe_block"):
        return {}
    c.expect("rms_norm_eps", ROUTER_EPS)
    logits: Plain = {"kind": "linear", "input": "stream", "input_norm": True}
    logits["multiplier"] = c.whole("hidden_size") ** -0.5
    route = router(c, top_k="top_k_experts", normalize=True, expert_scale=True, logits=logits)
    experts: Plain = {
        "kind": "moe",
        "n_experts": c.whole("num_experts"),
        "d_expert": c.whole("moe_intermediate_size"),
        **activation(c, "hidden_activation"),
        "router": route,
    }
    return {"shortcut": experts, "shortcut_input": "stream", "sum_norm": True}


FAMILIES: dict[str, Callable[[Config], Model]] = {"gemma4_text": gemma4_text}
