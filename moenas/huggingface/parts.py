"""Parts of an architecture from fields of a configuration: positions, attention, networks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from moenas.huggingface.config import Config
from moenas.records import Plain

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
}
"""`hidden_act` of a gated network -> its activation in a space file."""
NO_CHOICE = "a router learns nothing where the weight of its 1 expert is always 1; give 2 or more"
"""Why a family with normalized weights cannot have one expert for each token."""
BIAS_RATE = 0.001
"""Step of a selection bias, which configurations leave out (DeepSeek-V3, arXiv 2412.19437, 4.2)."""


def whole_model(c: Config, *, norm_eps: str = "rms_norm_eps", **fields: Any) -> Plain:
    """Return the fields of an architecture beside its blocks."""
    return {
        "vocab_size": c.whole("vocab_size"),
        "d_model": c.whole("hidden_size"),
        "norm_eps": c.number(norm_eps),
        "tie_embeddings": c.flag("tie_word_embeddings"),
        **fields,
    }


KEPT = ("rope_theta", "partial_rotary_factor")
"""Fields of positions whose default of the family holds beside those of the file."""
BESIDE = ("rope_theta", "partial_rotary_factor", "rope_scaling")
"""Fields of positions that older files have beside `rope_parameters`."""
_PARTIAL = """
    glm4_moe glm4_moe_lite laguna mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text
    qwen3_5_moe_text qwen3_next solar_open stablelm beam dots3_note_text mistral4
"""
PARTIAL = frozenset(_PARTIAL.split())
"""Families that read `partial_rotary_factor`; the others turn whole heads, whatever it is.

The last three have rules of their own for it.
"""


def rope_section(c: Config, kind: str | None = None, kept: Iterable[str] = KEPT) -> Config:
    """Return the fields of rotary positions, of layers of a kind where these have their own.

    A `rope_scaling` goes before `rope_parameters`, as in transformers. Where the file has fields,
    the family gives the missing ones of `kept` alone.
    """
    section, name = c.section("rope_parameters"), "rope_parameters"
    if c.get("rope_scaling"):
        defaults, section, name = section.defaults, c.section("rope_scaling"), "rope_scaling"
        section.defaults = defaults
    if kind is not None and kind in (section.fields or section.defaults):
        section = section.section(kind)
    elif kind is not None and _is_by_kind(section):
        raise c.error("rope_parameters", f"the field has no object for the layers of {kind}")
    replaced = section.fields or (name in c.fields and c.get(name) == {})
    if replaced:  # the file replaces the scaling that the family has
        section.defaults = {k: v for k, v in section.defaults.items() if k in kept}
    return section


def _is_by_kind(section: Config) -> bool:
    """Return whether the positions are objects by the kind of layers."""
    if section.fields:
        return any(isinstance(node.value, dict) for node in section.fields.values())
    return any(isinstance(value, dict) for value in section.defaults.values())


def check_positions(
    c: Config, kinds: Iterable[str], *, flat: bool = False, null: bool = False
) -> None:
    """Refuse `rope_parameters` without a theta for each kind of layers.

    Args:
        c: The configuration.
        kinds: The kinds of the layers that the model has.
        flat: One object can serve all kinds.
        null: A null can stand for layers without positions.
    """
    node = c.fields.get("rope_parameters")
    if node is None or node.value is None:
        return
    section = c.section("rope_parameters")
    if flat and not _is_by_kind(section):
        if "rope_theta" not in section.fields:
            raise c.error("rope_parameters", "the object has no rope_theta; give one")
        return
    for kind in sorted(set(kinds)):
        if kind not in section.fields:
            raise c.error("rope_parameters", f"the field has no object for the layers of {kind}")
        if null and section.get(kind) is None:
            continue
        if section.section(kind).fields.get("rope_theta") is None:
            raise c.error("rope_parameters", f"the object of {kind} has no rope_theta; give one")


def refuse_beside(c: Config, *names: str) -> None:
    """Refuse fields beside `rope_parameters` that the family does not read."""
    for name in names:
        if name in c.fields and c.get(name) is not None:
            raise c.error(
                name, "the family does not read this field; give rope_parameters by kind of layer"
            )


def inside_or_beside(c: Config, section: Config, name: str, usual: float) -> float:
    """Return a number of the positions: of their object, of the field beside it, of the family."""
    section.read.add(name)
    is_beside = name in c.fields and c.get(name) is not None
    holder = c if is_beside and name not in section.fields else section
    return holder.number(name, usual)


def rope(
    c: Config,
    kind: str | None = None,
    elsewhere: Iterable[str] = (),
    kept: Iterable[str] = KEPT,
) -> Plain:
    """Return the rotary positions of layers of a kind.

    Both forms are read: `rope_parameters`, and `rope_theta` with `rope_scaling`. A value inside of
    these goes before the same field beside them. The family reads the fields `elsewhere` by itself.
    See `rope_section` for `kept`.
    """
    scaling = rope_section(c, kind, kept)
    c.read |= {"rope_scaling", "rope_theta", "partial_rotary_factor"}
    plain: Plain = {"theta": inside_or_beside(c, scaling, "rope_theta", 10000.0)}
    share = inside_or_beside(c, scaling, "partial_rotary_factor", 1.0)
    if share != 1:
        plain["partial_rotary_factor"] = share
    kinds = {
        "default": None,
        "linear": _linear,
        "yarn": _yarn,
        "llama3": _llama3,
        "proportional": _proportional,
    }
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    scaling.read |= {"type", "mrope_section", "mrope_interleaved", *elsewhere}
    if name == "mrope":  # positions of text alone are those of "default"
        name = "default"
    if name not in kinds:
        raise scaling.no_counterpart(
            "rope_type" if "rope_type" in scaling.fields else "type", name, kinds
        )
    reader = kinds[name]
    if reader is not None:
        plain["scaling"] = {"kind": name, **reader(c, scaling)}
    if name == "proportional":  # the share of the pairs that turn
        plain["scaling"]["fraction"] = plain.pop("partial_rotary_factor", 1.0)
    elif c.family not in PARTIAL and plain.pop("partial_rotary_factor", 1) != 1 and reader:
        holder = scaling if "partial_rotary_factor" in scaling.fields else c
        raise holder.no_counterpart("partial_rotary_factor", share, [1])
    scaling.check_all_read()
    return plain


def _required(s: Config, name: str) -> float:
    """Return a number that this type of scaling needs."""
    if s.get(name) is None:
        raise s.error(name, "this type of positions needs the field; give a number")
    return s.number(name)


def _linear(c: Config, s: Config) -> Plain:
    return {"factor": _required(s, "factor")}


def _proportional(c: Config, s: Config) -> Plain:
    return {"factor": s.number("factor", 1.0)}


def _llama3(c: Config, s: Config) -> Plain:
    return {
        "factor": _required(s, "factor"),
        "original_max_position_embeddings": _original(c, s),
        "low_freq_factor": _required(s, "low_freq_factor"),
        "high_freq_factor": _required(s, "high_freq_factor"),
    }


def _original(c: Config, s: Config) -> int:
    return s.whole("original_max_position_embeddings", c.whole_or_none("max_position_embeddings"))


def _yarn(c: Config, s: Config) -> Plain:
    """Return YaRN; the ratio of `mscale` and `mscale_all_dim` scales cosines and sines."""
    factor = _required(s, "factor")
    plain: Plain = {
        "factor": factor,
        "original_max_position_embeddings": _original(c, s),
        "beta_fast": s.number("beta_fast", 32.0),
        "beta_slow": s.number("beta_slow", 1.0),
        "truncate": s.flag("truncate", True),
    }
    attention = s.number("attention_factor")
    one, all_dim = s.number("mscale"), s.number("mscale_all_dim")
    if attention:
        plain["attention_factor"] = attention
    elif one and all_dim:
        plain["attention_factor"] = _mscale(factor, one) / _mscale(factor, all_dim)
    return plain


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def attention(c: Config, positions: Plain, **fields: Any) -> Plain:
    """Return softmax attention with the heads of the configuration."""
    n_heads, width = c.whole("num_attention_heads"), head_dim(c)
    share = positions.get("partial_rotary_factor", 1)
    turned = int(width * share)
    if turned % 2:
        raise c.no_counterpart("partial_rotary_factor", share, ["an even number of dimensions"])
    if share != 1:  # transformers rounds down, and a space file to an even number
        positions = positions | {"partial_rotary_factor": turned / width if width else share}
    return {
        "kind": "attention",
        "head_dim": width,
        "n_heads": n_heads,
        "n_kv_heads": kv_heads(c, n_heads),
        "rope": positions,
        **{name: value for name, value in fields.items() if value is not None},
    }


_EQUAL_HEADS = """
    afmoe aria_text cohere2_moe flex_olmo granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared hunyuan_v1_moe llama olmoe
"""
EQUAL_HEADS = frozenset(_EQUAL_HEADS.split())
"""Families that have a head of keys for each of queries, if the file gives no number of them."""


def kv_heads(c: Config, n_heads: int) -> int:
    """Return the number of heads of keys and values; `n_heads` is that of queries."""
    if c.family in EQUAL_HEADS:
        return c.whole_unless_left_out("num_key_value_heads", n_heads)
    return c.whole("num_key_value_heads", n_heads)


def head_dim(c: Config) -> int:
    """Return the width of a head: that of the file, or hidden_size / num_attention_heads."""
    if "head_dim" in c.fields and c.whole_or_none("head_dim"):
        return c.whole("head_dim")
    c.read.add("head_dim")
    heads = c.whole("num_attention_heads")
    if c.family in FIXED_HEADS:
        return c.whole("head_dim")
    if not heads or c.whole("hidden_size") % heads:
        raise c.error("num_attention_heads", f"{heads} does not divide hidden_size")
    return c.whole("hidden_size") // heads


_FIXED_HEADS = """
    gpt_oss llama4_text minimax_m2 mimo_v2_flash qwen3 qwen3_next qwen3_5_moe_text afmoe
    solar_open cohere2_moe nemotron_h hy_v3 mellum flint laguna kolibri1 beam gemma4_text
    minimax_m3_vl_text
"""
FIXED_HEADS = frozenset(_FIXED_HEADS.split())
"""Families whose width of a head has a default that does not follow hidden_size."""


TURNED_HEADS = frozenset({"deepseek_v3", "axk1", "longcat_flash"})
"""Families of latent attention that turn `head_dim` dimensions, if the file has this field."""


def latent_attention(
    c: Config, positions: Plain, *, kind: str | None = None, **fields: Any
) -> Plain:
    """Return multi-head latent attention; `mscale_all_dim` of YaRN scales the scores.

    `kind` names the layers whose positions these are; see `rope_section`.
    """
    nope, turned = c.whole("qk_nope_head_dim"), c.whole("qk_rope_head_dim")
    c.read |= {"qk_head_dim", "head_dim", "num_key_value_heads", "rope_interleave"}
    sizes = {"qk_head_dim": nope + turned}
    if c.family in TURNED_HEADS:
        sizes["head_dim"] = turned
    for name, size in sizes.items():
        if name in c.fields and c.get(name) not in (None, size):
            raise c.no_counterpart(name, c.get(name), [size])
    plain: Plain = {
        "kind": "latent_attention",
        "n_heads": c.whole("num_attention_heads"),
        "q_rank": c.whole_or_none("q_lora_rank"),
        "kv_rank": c.whole("kv_lora_rank"),
        "nope_dim": nope,
        "rope_dim": turned,
        "v_dim": c.whole("v_head_dim"),
        "rope": positions,
        **fields,
    }
    scaling = rope_section(c, kind)
    all_dim = scaling.number("mscale_all_dim") if positions.get("scaling") else 0.0
    if all_dim:
        factor = _mscale(positions["scaling"]["factor"], all_dim)
        plain["scale"] = factor**2 / math.sqrt(nope + turned)
    return plain


def activation(c: Config, name: str = "hidden_act") -> Plain:
    """Return the activation of gated networks, if it is not swiglu."""
    value = c.get(name, "silu")
    if value not in ACTIVATIONS:
        raise c.no_counterpart(name, value, ACTIVATIONS)
    ours = ACTIVATIONS[value]
    return {} if ours == "swiglu" else {"activation": ours}


def dense(c: Config, width: str = "intermediate_size") -> Plain:
    """Return a dense network."""
    return {"kind": "dense", "d_ff": c.whole(width), **activation(c)}


def moe(c: Config, n_experts: str, d_expert: str, router: Plain, **fields: Any) -> Plain:
    """Return a mixture of experts, by the names of the fields with its number and width.

    Its activation is the configuration's, unless `fields` have one.
    """
    return {
        "kind": "moe",
        "n_experts": c.whole(n_experts),
        "d_expert": c.whole(d_expert),
        **({} if "activation" in fields else activation(c)),
        **fields,
        "router": router,
    }


def router(c: Config, *, top_k: str = "num_experts_per_tok", normalize: bool, **more: Any) -> Plain:
    """Return a router; its auxiliary loss is that of all layers, as transformers counts it."""
    coef = 0.0 if c.is_null("router_aux_loss_coef") else c.number("router_aux_loss_coef")
    plain: Plain = {"top_k": c.whole(top_k), "normalize": normalize, **more}
    if "balance" not in plain:
        loss: Plain = {"kind": "aux_loss", "coef": coef}
        plain |= {"balance": loss, "loss_reduce": "pooled"} if coef else {"balance": "none"}
    if plain["top_k"] == 1 and plain["normalize"]:
        raise c.error(top_k, NO_CHOICE)
    return plain


def biased_router(c: Config, **fields: Any) -> Plain:
    """Return a router with sigmoid scores and a bias on its selection (DeepSeek-V3)."""
    balance: Plain = {"kind": "bias", "rate": BIAS_RATE}
    return router(c, score="sigmoid", balance=balance, **fields)


def groups(c: Config, score: str, n: str = "n_group", top: str = "topk_group") -> Plain:
    """Return a selection within the best groups of experts, or nothing for one group."""
    n_groups, top_groups = c.whole(n, 1), c.whole(top, 1)
    for name, value in ((n, n_groups), (top, top_groups)):
        if not value:
            raise c.no_counterpart(name, value, ["1 or more"])
    if n_groups == top_groups:
        return {}
    fields = {"n_groups": n_groups, "top_groups": top_groups, "group_score": score}
    return {"selection": {"kind": "top_k", **fields}}


def softcap(c: Config, name: str = "final_logit_softcapping") -> float | None:
    """Return the bound of the logits, or None; the family divides by a 0, too."""
    if c.get(name) is None:
        return None
    cap = c.number(name)
    if cap <= 0:
        raise c.no_counterpart(name, cap, ["null", "a number above 0"])
    return cap


def layer_changes(c: Config, n_layers: int, known: Iterable[str]) -> dict[int, Plain]:
    """Return the sizes that `per_layer_config` changes, by the number of the layer.

    Null, as transformers has it, changes none.
    """
    given = c.get("per_layer_config")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise c.error("per_layer_config", "give an object of objects by the numbers of layers")
    for key, sizes in given.items():
        if str(key) not in map(str, range(n_layers)):
            raise c.error("per_layer_config", f"{key!r} is not the number of a layer")
        if not isinstance(sizes, dict):
            raise c.error("per_layer_config", f"layer {key}: give an object of sizes")
        for name, size in sizes.items():
            if name not in known:
                raise c.error("per_layer_config", f"layer {key}: {name} has no counterpart")
            if type(size) is not int or size < 1:
                raise c.error("per_layer_config", f"layer {key}: {name} is not a whole number")
    return {int(key): sizes for key, sizes in given.items()}
