"""The weights of a model in the names, shapes and orders that a family of Hugging Face publishes.

A layout says how a family names its weights. One function for each part of a layer splits our
tensors. Each takes the tensors of its part, so that none is written twice and none is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moenas.errors import MoenasError
from moenas.export.published_layouts import LAYOUTS, Layout, Named, Weights
from moenas.records import Plain

# Shapes: E experts, D model width, F width of a network, H heads of W elements.


def published_weights(family: str, whole: Plain, blocks: list[Plain], state: Weights) -> Weights:
    """Return the weights of a model under the names of a family, each a tensor of its own.

    `whole` and `blocks` are the canonical fields of the architecture, one block a layer.

    Raises:
        MoenasError: if a weight has no place in the family.
    """
    layout, rest = LAYOUTS[family], dict(state)
    named = {f"{layout.root}{layout.embedding}.weight": rest.pop("embedding")}
    for name in ("norm", "head"):
        for suffix in ("weight", "bias"):
            if (tensor := rest.pop(f"{name}.{suffix}", None)) is not None:
                theirs = f"{layout.root}{layout.final_norm}" if name == "norm" else "lm_head"
                named[f"{theirs}.{suffix}"] = (
                    tensor - 1 if layout.from_one and name == "norm" else tensor
                )
    if layout.norm_bias:
        named.setdefault("model.norm.bias", torch.zeros_like(named["model.norm.weight"]))
    number = 0
    for i, block in enumerate(blocks):
        prefix = f"blocks.{i}."
        layer = {n.removeprefix(prefix): rest.pop(n) for n in list(rest) if n.startswith(prefix)}
        for part, weights in parts_of(block, layer) if layout.one_part else [(block, layer)]:
            for name, tensor in layer_weights(layout, part, weights):
                named[f"{layout.root}layers.{number}.{name}"] = tensor
            rest |= {prefix + name: tensor for name, tensor in weights.items()}
            number += 1
    if rest:
        raise MoenasError(f"{family} has no place for the weights {', '.join(sorted(rest))}")
    return {name: tensor.detach().clone().contiguous() for name, tensor in named.items()}


def parts_of(block: Plain, layer: Weights) -> list[tuple[Plain, Weights]]:
    """Return the mixer and the feed-forward layer of a block, each as a block with its weights."""
    second = {n: x for n, x in layer.items() if n.startswith(("norm2.", "ffn."))}
    first = {n: x for n, x in layer.items() if n not in second}
    parts = [({**block, "ffn": None}, first), ({**block, "mixer": None}, second)]
    return [(one, weights) for one, weights in parts if one["mixer"] or one["ffn"]]


def layer_weights(layout: Layout, block: Plain, layer: Weights) -> Named:
    """Yield the weights of a layer; those that were taken are no longer in `layer`."""
    if "scale" in layer:
        yield "layer_scalar", layer.pop("scale")
    if "sum_norm.weight" in layer:
        yield from beside_network(layout, layer)
    for ours, theirs in layout.norms.items():
        for suffix in ("weight", "bias"):
            if f"{ours}.{suffix}" in layer:
                tensor = layer.pop(f"{ours}.{suffix}")
                yield f"{theirs}.{suffix}", tensor - 1 if layout.from_one else tensor
            elif layout.norm_bias and not (ours == "norm2" and block["parallel"]):
                yield f"{theirs}.{suffix}", torch.zeros_like(tensor)
    mixer, ffn = _part(layer, "mixer."), _part(layer, "ffn.")
    if block["mixer"]:
        prefix, write = MIXERS.get(block["mixer"]["kind"], ("self_attn.", attention))
        for name, tensor in write(layout, block["mixer"], mixer):
            yield f"{prefix if layout.mixer is None else layout.mixer}{name}", tensor
    if block["ffn"] and block["ffn"]["kind"] == "moe":
        yield from mixture(layout, ffn)
    elif block["ffn"]:
        yield from network(layout, layout.dense, ffn)
    layer |= {f"mixer.{name}": tensor for name, tensor in mixer.items()}
    layer |= {f"ffn.{name}": tensor for name, tensor in ffn.items()}


def beside_network(layout: Layout, layer: Weights) -> Named:
    """Yield Gemma 4's mixture beside a dense network, and the norms of both and of their sum."""
    names = {
        "norm2.after": "post_feedforward_layernorm_1",
        "shortcut.before": "pre_feedforward_layernorm_2",
        "shortcut.after": "post_feedforward_layernorm_2",
        "sum_norm": "post_feedforward_layernorm",
    }
    for ours, theirs in names.items():
        yield f"{theirs}.weight", layer.pop(f"{ours}.weight")
    part = _part(layer, "shortcut.ffn.")
    yield "router.scale", part.pop("router.enter.norm.weight")
    yield "router.per_expert_scale", part.pop("router.weights.expert_scale")
    yield from mixture(layout, part)
    layer |= {f"shortcut.ffn.{name}": tensor for name, tensor in part.items()}


def _part(layer: Weights, prefix: str) -> Weights:
    names = [name for name in layer if name.startswith(prefix)]
    return {name.removeprefix(prefix): layer.pop(name) for name in names}


def attention(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield softmax attention: queries, keys and values lie in one matrix of ours.

    Keys can serve as values, and the keys of an earlier layer can serve this one.
    """
    n, n_kv, width = mixer["n_heads"], mixer["n_kv_heads"], mixer["head_dim"]
    heads = {"q": (n, width), "k": (n_kv, width), "v": (n_kv, mixer["v_head_dim"])}
    turning = round(width * mixer["rope"]["partial_rotary_factor"])
    own = "".join(heads) if not mixer["k_eq_v"] else "qk"
    for stem, names in (("qkv", own), ("qkv.qkv", own), ("queries.project", "q")):
        for suffix in ("weight", "bias"):
            if f"{stem}.{suffix}" not in part:
                continue
            sizes = [heads[name][0] * heads[name][1] for name in names]
            for name, tensor in zip(names, part.pop(f"{stem}.{suffix}").split(sizes), strict=True):
                if layout.neighbours and name != "v":
                    tensor = neighbours(tensor, *heads[name], turning)
                if layout.gated_queries and name == "q":
                    gates = part.pop(f"gate.{suffix}").unflatten(0, (n, width))
                    tensor = torch.cat((tensor.unflatten(0, (n, width)), gates), dim=1)
                    tensor = tensor.flatten(0, 1)
                yield f"{name}_proj.{suffix}", tensor
    q_norm, k_norm = layout.qk_norms
    for ours, theirs in {"norm.q": q_norm, "norm.k": k_norm, "queries.norm": q_norm}.items():
        if f"{ours}.weight" in part:
            tensor = part.pop(f"{ours}.weight")
            yield f"{theirs}.weight", tensor - 1 if layout.from_one else tensor
    for ours, theirs in {
        "out.weight": f"{layout.out}.weight",
        "out.bias": f"{layout.out}.bias",
        "attend.sinks": layout.sinks,
        "gate.weight": f"{layout.output_gate}.weight",
        "gate.head_bias": "gate_bias",
    }.items():
        if ours in part:
            yield theirs, part.pop(ours)
    if "indexer.query.weight" in part:
        yield from block_indexer(layout, part)


def block_indexer(layout: Layout, part: Weights) -> Named:
    """Yield the block indexer of MiniMax-M3."""
    names = {"query": "q_proj", "key": "k_proj", "query_norm": "q_norm", "key_norm": "k_norm"}
    for ours, theirs in names.items():
        tensor = part.pop(f"indexer.{ours}.weight")
        is_distance = layout.from_one and ours.endswith("norm")
        yield f"indexer.{theirs}.weight", tensor - 1 if is_distance else tensor


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
    yield f"{layout.out}.weight", part.pop("out.weight")
    if "gate.weight" in part:
        yield f"{layout.output_gate}.weight", part.pop("gate.weight")
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


KIMI_DELTA = {
    "decay.dt_bias": "dt_bias",
    "decay.project.weight": "f_proj.weight",
    "decay.project.down.weight": "f_a_proj.weight",
    "decay.project.up.weight": "f_b_proj.weight",
    "gate.weight": "g_proj.weight",
    "gate.down.weight": "g_a_proj.weight",
    "gate.up.weight": "g_b_proj.weight",
    "norm.weight": "o_norm.weight",
}
"""Weight of Kimi delta attention of ours -> its name."""


def kimi_delta(layout: Layout, mixer: Plain, part: Weights) -> Named:
    """Yield Kimi delta attention, whose queries, keys and values have kernels of their own."""
    heads, key, value = mixer["n_heads"], mixer["key_dim"], mixer["value_dim"]
    sizes = {"q": heads * key, "k": heads * key, "v": heads * value}
    rows = part.pop("project.weight").split([*sizes.values(), heads])
    for name, tensor in zip((*sizes, "b"), rows, strict=True):
        yield f"{name}_proj.weight", tensor
    kernels = part.pop("convolution.weight").split([*sizes.values()])
    for name, tensor in zip(sizes, kernels, strict=True):
        yield f"{name}_conv1d.weight", tensor.unsqueeze(1)
    yield "A_log", part.pop("decay.log_rate").view(layout.rates)
    yield f"{layout.out}.weight", part.pop("out.weight")
    for ours, theirs in KIMI_DELTA.items():
        if ours in part:
            yield theirs, part.pop(ours)


STATE_SPACE = {
    "project": "in_proj",
    "convolution": "conv1d",
    "choose.project": "x_proj",
    "choose.dt": "dt_proj",
    "choose.dt_bias": "dt_proj.bias",
    "choose.norms.0": "dt_layernorm",
    "choose.norms.1": "b_layernorm",
    "choose.norms.2": "c_layernorm",
    "dt_bias": "dt_bias",
    "log_rate": "A_log",
    "skip": "D",
    "norm": "norm",
    "out": "out_proj",
}
"""Part of a Mamba or Mamba-2 layer of ours -> its name."""
SHORT_CONV = {"project": "in_proj", "convolution": "conv", "out": "out_proj"}
"""Part of a gated short convolution of ours -> its name (LFM2)."""


def renamed(names: dict[str, str]) -> Callable[[Layout, Plain, Weights], Named]:
    """Return what yields the weights of a mixer under other names.

    The kernels of a convolution, (C, K), are written with a dimension of 1, (C, 1, K).
    """

    def write(layout: Layout, mixer: Plain, part: Weights) -> Named:
        for ours, theirs in names.items():
            if ours in part:
                yield theirs, part.pop(ours)
            for suffix in ("weight", "bias"):
                if f"{ours}.{suffix}" in part:
                    tensor = part.pop(f"{ours}.{suffix}")
                    is_kernel = ours == "convolution" and suffix == "weight"
                    yield f"{theirs}.{suffix}", tensor.unsqueeze(1) if is_kernel else tensor

    return write


MIXERS: dict[str, tuple[str, Callable[[Layout, Plain, Weights], Named]]] = {
    "latent_attention": ("self_attn.", latent_attention),
    "gated_delta": ("linear_attn.", gated_delta),
    "kimi_delta": ("self_attn.", kimi_delta),
    "mamba": ("mamba.", renamed(STATE_SPACE)),
    "mamba2": ("mamba.", renamed(STATE_SPACE)),
    "short_conv": ("conv.", renamed(SHORT_CONV)),
}
"""Kind of a mixer -> the prefix of its weights and what writes them; others are attention."""


def network(layout: Layout, prefix: str, part: Weights, ours: str = "") -> Named:
    """Yield a gated network: gate and value lie in one matrix of ours."""
    *inputs, output = layout.network
    for name, tensor in zip(inputs, part.pop(f"{ours}up.weight").chunk(len(inputs)), strict=True):
        yield f"{prefix}{name}.weight", tensor
    yield f"{prefix}{output}.weight", part.pop(f"{ours}down.weight")


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
        yield layout.bias, bias.unsqueeze(0) if "statics" in layout.bias else bias
    if layout.stacks is not None:
        yield from layout.stacks(layout, part)
    else:
        yield from separate(layout, part)
    if "shared.gate.weight" in part:
        yield f"{prefix}shared_expert_gate.weight", part.pop("shared.gate.weight")
    if "shared.up.weight" in part:
        yield from network(layout, layout.shared, part, "shared.")
    elif layout.writes_no_shared:
        empty = {
            "up.weight": router.new_empty(0, d_model),
            "down.weight": router.new_empty(d_model, 0),
        }
        yield from network(layout, layout.shared, empty)


def separate(layout: Layout, part: Weights) -> Named:
    """Yield a matrix for each gate, value and output of an expert; ours lie as (E, in, out)."""
    up, down = part.pop("experts.up").mT, part.pop("experts.down").mT
    for e in range(len(up)):
        matrices = (*up[e].chunk(len(layout.expert) - 1), down[e])
        for name, tensor in zip(layout.expert, matrices, strict=True):
            yield f"{layout.experts}experts.{e}.{name}.weight", tensor


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
