"""The weights of a model in the names, shapes and orders that a family of Hugging Face publishes.

A layout says how a family names its weights. One function for each part of a layer splits our
tensors. Each takes the tensors of its part, so that none is written twice and none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from moenas.errors import MoenasError
from moenas.records import Plain

Weights: TypeAlias = "dict[str, Tensor]"
Named: TypeAlias = "Iterator[tuple[str, Tensor]]"

# Shapes: E experts, D model width, F width of a network, H heads of W elements.


@dataclass(frozen=True)
class Layout:
    """The names of a family; a prefix ends with a dot."""

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """Norms of the mixer and of the feed-forward layer."""
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    dense: str = "mlp."
    experts: str = "mlp."
    """Prefix of a mixture of experts."""
    router: str = "gate"
    bias: str | None = None
    """The bias of the selection, below the prefix of the mixture."""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Gate, value and output of an expert."""
    shared: str = "shared_experts."
    stacks: Callable[[Layout, Weights], Named] | None = None
    """Writes the experts as stacked matrices; None: a matrix for each expert."""
    neighbours: bool = False
    """Whether rotary positions turn pairs of neighbours; ours turn pairs of halves."""
    norm_bias: bool = False
    """Whether every norm has a bias; without one of ours it is 0."""
    indexer_neighbours: bool = False
    """Whether rotary positions of a token indexer turn pairs of neighbours."""
    from_one: bool = False
    """Whether the weight of a norm is written as its distance from 1."""
    gated_queries: bool = False
    """Whether each head has its queries and then its gates in one matrix."""
    writes_no_shared: bool = False
    """Whether a mixture without shared experts still has their matrices, of width 0."""


def gate_up(layout: Layout, part: Weights) -> Named:
    """Yield gpt-oss's stacks, in which gates and values alternate."""
    yield layout.experts + "experts.gate_up_proj", alternating(part.pop("experts.up"))
    yield layout.experts + "experts.down_proj", part.pop("experts.down")
    if "experts.up_bias.weight" in part:
        up = alternating(part.pop("experts.up_bias.weight"))
        yield layout.experts + "experts.gate_up_proj_bias", up
        yield layout.experts + "experts.down_proj_bias", part.pop("experts.down_bias.weight")


def plain_stacks(layout: Layout, part: Weights) -> Named:
    """Yield Llama 4's stacks, which lie as ours, (E, D, 2 F) and (E, F, D)."""
    yield layout.experts + "experts.gate_up_proj", part.pop("experts.up")
    yield layout.experts + "experts.down_proj", part.pop("experts.down")


def linear_stacks(layout: Layout, part: Weights) -> Named:
    """Yield Granite's stacks, (E, 2 F, D) and (E, D, F)."""
    yield layout.experts + "input_linear.weight", part.pop("experts.up").mT
    yield layout.experts + "output_linear.weight", part.pop("experts.down").mT


BIASED = Layout(bias="gate.e_score_correction_bias", writes_no_shared=True)
MIXTRAL = Layout(experts="block_sparse_moe.", expert=("w1", "w3", "w2"))
LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe"), Layout()),
    "mixtral": MIXTRAL,
    "phimoe": replace(MIXTRAL, norm_bias=True),
    "stablelm": Layout(norm_bias=True),
    "qwen2_moe": Layout(shared="shared_expert."),
    "flex_olmo": Layout(norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "granitemoe": Layout(experts="block_sparse_moe.", router="router.layer", stacks=linear_stacks),
    "gpt_oss": Layout(router="router", stacks=gate_up),
    "glm4_moe": BIASED,
    "dots1": BIASED,
    "deepseek_v3": replace(BIASED, neighbours=True),
    "deepseek_v2": Layout(neighbours=True, writes_no_shared=True),
    "glm4_moe_lite": replace(BIASED, neighbours=True),
    "minimax_m2": replace(MIXTRAL, bias="e_score_correction_bias"),
    "ernie4_5_moe": Layout(bias="moe_statics.e_score_correction_bias", neighbours=True),
    "hunyuan_v1_moe": Layout(
        qk_norms=("query_layernorm", "key_layernorm"), router="gate.wg", shared="shared_mlp."
    ),
    "qwen3_next": Layout(shared="shared_expert.", from_one=True, gated_queries=True),
    "llama4_text": Layout(
        dense="feed_forward.",
        experts="feed_forward.",
        router="router",
        shared="shared_expert.",
        stacks=plain_stacks,
        neighbours=True,
    ),
    "deepseek_v32": replace(BIASED, neighbours=True),
    "glm_moe_dsa": replace(BIASED, neighbours=True, indexer_neighbours=True),
    "exaone_moe": replace(BIASED, bias="e_score_correction_bias"),
    "hy_v3": replace(BIASED, router="router.gate", bias="expert_bias", shared="shared_mlp."),
    "mellum": Layout(),
}
"""`model_type` -> the names of its weights, as its released files have them."""


def published_weights(family: str, whole: Plain, blocks: list[Plain], state: Weights) -> Weights:
    """Return the weights of a model under the names of a family, each a tensor of its own.

    `whole` and `blocks` are the canonical fields of the architecture, one block a layer.

    Raises:
        MoenasError: if a weight has no place in the family.
    """
    layout, rest = LAYOUTS[family], dict(state)
    named = {"model.embed_tokens.weight": rest.pop("embedding")}
    for name in ("norm", "head"):
        for suffix in ("weight", "bias"):
            if (tensor := rest.pop(f"{name}.{suffix}", None)) is not None:
                theirs = "model.norm" if name == "norm" else "lm_head"
                named[f"{theirs}.{suffix}"] = (
                    tensor - 1 if layout.from_one and name == "norm" else tensor
                )
    if layout.norm_bias:
        named.setdefault("model.norm.bias", torch.zeros_like(named["model.norm.weight"]))
    for i, block in enumerate(blocks):
        prefix = f"blocks.{i}."
        layer = {n.removeprefix(prefix): rest.pop(n) for n in list(rest) if n.startswith(prefix)}
        for name, tensor in layer_weights(layout, block, layer):
            named[f"model.layers.{i}.{name}"] = tensor
        rest |= {prefix + name: tensor for name, tensor in layer.items()}
    if rest:
        raise MoenasError(f"{family} has no place for the weights {', '.join(sorted(rest))}")
    return {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}


def layer_weights(layout: Layout, block: Plain, layer: Weights) -> Named:
    """Yield the weights of a layer; those that were taken are no longer in `layer`."""
    for ours, theirs in zip(("norm1", "norm2"), layout.norms, strict=True):
        for suffix in ("weight", "bias"):
            if f"{ours}.{suffix}" in layer:
                tensor = layer.pop(f"{ours}.{suffix}")
                yield f"{theirs}.{suffix}", tensor - 1 if layout.from_one else tensor
            elif layout.norm_bias and not (ours == "norm2" and block["parallel"]):
                yield f"{theirs}.{suffix}", torch.zeros_like(tensor)
    mixer, ffn = _part(layer, "mixer."), _part(layer, "ffn.")
    prefix, write = MIXERS.get(block["mixer"]["kind"], ("self_attn.", attention))
    for name, tensor in write(layout, block["mixer"], mixer):
        yield f"{prefix}{name}", tensor
    if block["ffn"]["kind"] == "moe":
        yield from mixture(layout, ffn)
    else:
        yield from network(layout.dense, ffn)
    layer |= {f"mixer.{name}": tensor for name, tensor in mixer.items()}
    layer |= {f"ffn.{name}": tensor for name, tensor in ffn.items()}


def _part(layer: Weights, prefix: str) -> Weights:
    names = [name for name in layer if name.startswith(prefix)]
    return {name.removeprefix(prefix): layer.pop(name) for name in names}


def attention(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield softmax attention: queries, keys and values lie in one matrix of ours."""
    n, n_kv, width = mixer["n_heads"], mixer["n_kv_heads"], mixer["head_dim"]
    heads = {"q": (n, width), "k": (n_kv, width), "v": (n_kv, mixer["v_head_dim"])}
    turning = round(width * mixer["rope"]["partial_rotary_factor"])
    for suffix in ("weight", "bias"):
        if f"qkv.{suffix}" not in part:
            continue
        sizes = [number * size for number, size in heads.values()]
        for name, tensor in zip(heads, part.pop(f"qkv.{suffix}").split(sizes), strict=True):
            if layout.neighbours and name != "v":
                tensor = neighbours(tensor, *heads[name], turning)
            if layout.gated_queries and name == "q":
                gates = part.pop(f"gate.{suffix}").unflatten(0, (n, width))
                tensor = torch.cat((tensor.unflatten(0, (n, width)), gates), dim=1).flatten(0, 1)
            yield f"{name}_proj.{suffix}", tensor
    for name, theirs in zip("qk", layout.qk_norms, strict=True):
        if f"norm.{name}.weight" in part:
            tensor = part.pop(f"norm.{name}.weight")
            yield f"{theirs}.weight", tensor - 1 if layout.from_one else tensor
    yield "o_proj.weight", part.pop("out.weight")
    if "out.bias" in part:
        yield "o_proj.bias", part.pop("out.bias")
    if "attend.sinks" in part:
        yield "sinks", part.pop("attend.sinks")


def latent_attention(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield multi-head latent attention."""
    turning, width = mixer["rope_dim"], mixer["nope_dim"] + mixer["rope_dim"]
    pairs = layout.neighbours

    def turned(tensor: Tensor, n_heads: int, size: int) -> Tensor:
        return neighbours(tensor, n_heads, size, turning) if pairs else tensor

    if "query.weight" in part:
        yield "q_proj.weight", turned(part.pop("query.weight"), mixer["n_heads"], width)
    else:
        yield "q_a_proj.weight", part.pop("query.down.weight")
        yield "q_a_layernorm.weight", part.pop("query.norm.weight")
        yield "q_b_proj.weight", turned(part.pop("query.up.weight"), mixer["n_heads"], width)
    down = part.pop("keys.down.weight")
    yield "kv_a_proj_with_mqa.weight", turned(down, 1, len(down))
    yield "kv_a_layernorm.weight", part.pop("keys.norm.weight")
    yield "kv_b_proj.weight", part.pop("keys.up.weight")
    yield "o_proj.weight", part.pop("out.weight")
    if "indexer.query.weight" in part:
        yield from token_indexer(layout, mixer, part)


def token_indexer(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield a token indexer, whose heads begin with the rows that have a position."""
    indexer, turning = mixer["indexer"], mixer["rope_dim"]
    names = {
        "wq_b.weight": ("query.weight", indexer["n_heads"]),
        "wk.weight": ("key.weight", 1),
        "k_norm.weight": ("norm.weight", 1),
        "k_norm.bias": ("norm.bias", 1),
    }
    for theirs, (ours, n_heads) in names.items():
        tensor = part.pop(f"indexer.{ours}")
        if layout.indexer_neighbours:
            heads = tensor.unflatten(0, (n_heads, indexer["head_dim"]))
            turned = neighbours(heads[:, :turning].flatten(0, 1), n_heads, turning, turning)
            turned = turned.unflatten(0, (n_heads, turning))
            tensor = torch.cat((turned, heads[:, turning:]), dim=1).flatten(0, 1)
        yield f"indexer.{theirs}", tensor
    yield "indexer.weights_proj.weight", part.pop("indexer.weigh.weight")


def gated_delta(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield Qwen3-Next's gated delta net: rows by key head, where ours are by kind.

    A key head has its query, key, values and gates in one matrix, and its betas and steps in
    another.
    """
    heads, values = mixer["n_key_heads"], mixer["n_heads"]
    keys, width = heads * mixer["key_dim"], values * mixer["value_dim"]
    sizes = (keys, keys, width, width, values, values)
    rows = part.pop("project.weight").split(sizes)
    by_head = [x.unflatten(0, (heads, -1)) for x in rows]
    yield "in_proj_qkvz.weight", torch.cat(by_head[:4], dim=1).flatten(0, 1)
    yield "in_proj_ba.weight", torch.cat(by_head[4:], dim=1).flatten(0, 1)
    yield "conv1d.weight", part.pop("convolution.weight").unsqueeze(1)
    yield "A_log", part.pop("log_rate")
    yield "dt_bias", part.pop("dt_bias")
    yield "norm.weight", part.pop("norm.weight")
    yield "out_proj.weight", part.pop("out.weight")


MIXERS: dict[str, tuple[str, Callable[[Layout, Plain, Weights], Named]]] = {
    "latent_attention": ("self_attn.", latent_attention),
    "gated_delta": ("linear_attn.", gated_delta),
}
"""Kind of a mixer -> the prefix of its weights and what writes them; others are attention."""


def network(prefix: str, part: Weights, ours: str = "") -> Named:
    """Yield a gated network: gate and value lie in one matrix of ours."""
    gate, value = part.pop(f"{ours}up.weight").chunk(2)
    yield f"{prefix}gate_proj.weight", gate
    yield f"{prefix}up_proj.weight", value
    yield f"{prefix}down_proj.weight", part.pop(f"{ours}down.weight")


def mixture(layout: Layout, part: Weights) -> Named:
    """Yield a mixture of experts: router, bias of the selection, experts and shared experts."""
    prefix, router = layout.experts, part.pop("router.logits.weight")
    n_experts, d_model = router.shape
    yield f"{prefix}{layout.router}.weight", router
    if "router.logits.bias" in part:
        yield f"{prefix}{layout.router}.bias", part.pop("router.logits.bias")
    if layout.bias is not None:
        bias = part.pop("balance.bias", None)
        bias = router.new_zeros(n_experts) if bias is None else bias
        # ERNIE's bias has one row for each kind of tokens; text is the first.
        yield prefix + layout.bias, bias.unsqueeze(0) if "statics" in layout.bias else bias
    if layout.stacks is not None:
        yield from layout.stacks(layout, part)
    else:
        yield from separate(layout, part)
    if "shared.gate.weight" in part:
        yield f"{prefix}shared_expert_gate.weight", part.pop("shared.gate.weight")
    if "shared.up.weight" in part:
        yield from network(prefix + layout.shared, part, "shared.")
    elif layout.writes_no_shared:
        empty = {
            "up.weight": router.new_empty(0, d_model),
            "down.weight": router.new_empty(d_model, 0),
        }
        yield from network(prefix + layout.shared, empty)


def separate(layout: Layout, part: Weights) -> Named:
    """Yield a matrix for each gate, value and output of an expert; ours lie as (E, in, out)."""
    up, down = part.pop("experts.up").mT, part.pop("experts.down").mT
    for e in range(len(up)):
        for name, tensor in zip(layout.expert, (*up[e].chunk(2), down[e]), strict=True):
            yield f"{layout.experts}experts.{e}.{name}.weight", tensor


def alternating(x: Tensor) -> Tensor:
    """Return two halves of the last dimension as alternating elements."""
    first, second = x.chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def neighbours(x: Tensor, n_heads: int, width: int, turning: int) -> Tensor:
    """Return rows of heads whose last `turning` rows turn as pairs of halves, as neighbours.

    `x` is (n_heads * width, ...); for one head, rows before it stay.
    """
    if not turning:
        return x
    heads = x.unflatten(0, (n_heads, width))
    still, turned = heads.split((width - turning, turning), dim=1)
    first, second = turned.chunk(2, dim=1)
    pairs = torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((still, pairs), dim=1).flatten(0, 1)
