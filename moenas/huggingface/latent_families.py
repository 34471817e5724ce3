"""Families of latent attention with temperatures, indexers, and norms of some parts."""

from __future__ import annotations

from collections.abc import Callable

from moenas.huggingface.config import Config
from moenas.huggingface.parts import (
    check_positions,
    groups,
    latent_attention,
    layer_changes,
    refuse_beside,
    rope,
    rope_section,
    router,
)
from moenas.huggingface.parts import moe as mixture
from moenas.huggingface.softmax_families import (
    SPARSE,
    Model,
    biased_experts,
    with_first_dense,
)
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
    if not scaling.fields:  # the family fills in all positions, with its own theta
        refuse_beside(c, "rope_theta")
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
    n, first = c.whole("num_hidden_layers"), c.whole("first_k_dense_replace", 0)
    types = c.kinds("mlp_layer_types", n, SPARSE)
    if types is not None and types != [i >= first for i in range(n)]:
        raise c.error(
            "mlp_layer_types", "the family does not read this field; give first_k_dense_replace"
        )
    return with_first_dense(c, [mixer] * n, experts)


def indexer(c: Config) -> Plain:
    """Return the token indexer of DeepSeek-V3.2."""
    return {
        "n_heads": c.whole("index_n_heads"),
        "head_dim": c.whole("index_head_dim"),
        "top_k": c.whole("index_topk"),
    }


def deepseek_v32(c: Config) -> Model:
    """DeepSeek-V3.2: each token reads the tokens that an indexer selects."""
    return _indexed(c)


def _indexed(c: Config, indexers: list[bool] | None = None, name: str = "") -> Model:
    """Return DeepSeek-V3.2; `indexers` says which layers have one, by the field `name`."""
    n = c.whole("num_hidden_layers")
    c.expect("attention_bias", False)
    c.expect("mlp_bias", False)
    c.kinds("layer_types", n, {"indexed_attention": True})
    positions = rope(c)
    own = indexers or [True] * n
    if not own[0]:
        raise c.error(name, "the first layer has no earlier indexer to share; give it one")
    mixers = [
        latent_attention(
            c, positions, **({"indexer": indexer(c)} if one else {"index_shared": True})
        )
        for one in own
    ]
    experts = biased_experts(c, "n_routed_experts", groups(c, "top2_sum"))
    return with_first_dense(c, mixers, experts)


INDEXERS = {"full": True, "shared": False}
LETTERS = {"F": True, "S": False}
"""Words and letters for a layer with an indexer of its own, and for one that reads the one before.

`index_topk_pattern` is a text of letters or a list of words.
"""


def glm_moe_dsa(c: Config) -> Model:
    """GLM-5: DeepSeek-V3.2, in which layers can share the indexer of an earlier layer."""
    n = c.whole("num_hidden_layers")
    c.read |= {"index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}
    own = c.kinds("indexer_types", n, INDEXERS)
    if own is not None:
        return _indexed(c, own, "indexer_types")
    pattern = c.get("index_topk_pattern")
    if pattern is not None:
        known = LETTERS if isinstance(pattern, str) else INDEXERS
        is_right = isinstance(pattern, (str, list)) and len(pattern) == n
        if not is_right or any(one not in known for one in pattern):
            forms = [f"a text of F or S for each of {n} layers", "a list of full or shared"]
            raise c.no_counterpart("index_topk_pattern", pattern, forms)
        return _indexed(c, [known[one] for one in pattern], "index_topk_pattern")
    step = max(c.whole("index_topk_freq", 1), 1)
    offset = c.whole("index_skip_topk_offset", 2)
    shared = [max(i - offset + 1, 0) % step > 0 for i in range(n)]
    return _indexed(c, [not one for one in shared], "index_topk_freq")


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
    names = {word: key for key, word in DOTS_KINDS.items()}
    usual = c.defaults["rope_parameters"]  # the default model has no layer of full attention
    usual = {**usual, "full_attention": usual["indexed_attention"]}
    c.defaults = {**c.defaults, "rope_parameters": usual}
    known = {*DOTS_SIZES.values(), "num_key_value_heads", "head_dim"}
    changes = layer_changes(c, n, known)
    if "per_layer_config" not in c.fields and set(kinds) != {"indexed"}:
        raise c.error("per_layer_config", "the field is missing; give the sizes of these layers")
    if c.get("use_dsa") is not None:
        raise c.error("use_dsa", "the field changes layer_types; delete it and give layer_types")
    refuse_beside(c, "rope_scaling")
    if c.get("rope_parameters") is None or "rope_parameters" not in c.fields:
        refuse_beside(c, "swa_rope_theta", "rope_theta")
    check_positions(c, [names[kind] for kind in kinds], flat=True)
    c.read |= {"swa_rope_theta", "head_dim", "shared_experts_intermediate_size"}
    fields: Plain = {"inner_eps": eps, "rank_scale": True, "output_gate": "head", "rope_norm": True}
    mixers = []
    for i, kind in enumerate(kinds):
        name = names[kind]
        positions = rope(c, name, elsewhere=("partial_rotary_factor",))
        positions.pop("partial_rotary_factor", None)  # the share of qk_rope_head_dim in a head
        more: Plain = {"indexer": indexer(c)} if kind == "indexed" else {}
        if kind == "local":
            more = {"window": c.whole("sliding_window")}
        mixer = latent_attention(c, positions, kind=name, **fields, **more)
        of_layer = changes.get(i, {})
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
