"""Fields of a config.json that many families have, from the layers of an architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moenas.huggingface.parts import ACTIVATIONS
from moenas.records import Plain

HIDDEN_ACTS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
"""Activation of a space file -> `hidden_act`."""


@dataclass(frozen=True)
class Layers:
    """A canonical architecture as plain data, one block a layer."""

    whole: Plain
    """The fields of the architecture beside its blocks."""
    blocks: list[Plain]

    def first(self, part: str, kind: str) -> Plain:
        """Return the first mixer or ffn of a kind; without one, no fields."""
        parts = (block[part] for block in self.blocks)
        return next((x for x in parts if x is not None and x["kind"] == kind), {})

    @property
    def attention(self) -> Plain:
        """The first softmax attention; one that has positions goes first."""
        mixers = [block["mixer"] for block in self.blocks if block["mixer"]]
        turned = [
            x for x in mixers if x["kind"] == "attention" and x["rope"]["partial_rotary_factor"]
        ]
        return turned[0] if turned else self.first("mixer", "attention")

    @property
    def latent(self) -> Plain:
        """The first latent attention."""
        return self.first("mixer", "latent_attention")

    @property
    def dense(self) -> Plain:
        """The first dense network."""
        return self.first("ffn", "dense")

    @property
    def experts(self) -> Plain:
        """The first mixture of experts."""
        return self.first("ffn", "moe")

    @property
    def router(self) -> Plain:
        """The router of the first mixture of experts."""
        router: Plain = self.experts.get("router", {})
        return router

    @property
    def sparse(self) -> list[bool]:
        """Which layers have experts."""
        return [bool(block["ffn"]) and block["ffn"]["kind"] == "moe" for block in self.blocks]

    @property
    def windows(self) -> list[int | None]:
        """The window of the mixer of each layer."""
        return [(block["mixer"] or {}).get("window") for block in self.blocks]


def whole_fields(m: Layers, norm_eps: str = "rms_norm_eps") -> Plain:
    """Write the sizes of the whole model and the activation of its networks."""
    name = (m.experts or m.dense).get("activation", "swiglu")
    return {
        "vocab_size": m.whole["vocab_size"],
        "hidden_size": m.whole["d_model"],
        "num_hidden_layers": len(m.blocks),
        "hidden_act": HIDDEN_ACTS.get(name, "silu"),
        norm_eps: m.whole["norm_eps"],
        "tie_word_embeddings": m.whole["tie_embeddings"],
    }


def rope_fields(mixer: Plain, *, partial: bool = False) -> Plain:
    """Write rotary positions, in the form of transformers 5 and in the form before it.

    `partial` families can turn a part of each head.
    """
    if not mixer:
        return {}
    rope: Plain = mixer["rope"]
    share, theta = rope["partial_rotary_factor"], rope["theta"] or 10000.0
    scaling = {k: v for k, v in (rope["scaling"] or {}).items() if v is not None}
    kind = scaling.pop("kind", "default")
    if kind == "proportional":  # the share of the pairs that turn
        share, partial = scaling.pop("fraction"), True
    if kind == "yarn" and mixer["kind"] == "latent_attention" and mixer["scale"]:
        scaling |= latent_yarn(mixer, scaling["factor"])
    fields: Plain = {
        "rope_theta": theta,
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling},
    }
    if scaling:
        fields["rope_scaling"] = {"rope_type": kind, **scaling}
    if partial:
        fields["partial_rotary_factor"] = share
        fields["rope_parameters"]["partial_rotary_factor"] = share
    return fields


def latent_yarn(mixer: Plain, factor: float) -> Plain:
    """Write `mscale_all_dim`, which gives latent attention the factor of its scores.

    scale = (0.1 mscale_all_dim ln(factor) + 1)^2 / sqrt(nope_dim + rope_dim) (DeepSeek-V2's code).
    """
    width = mixer["nope_dim"] + mixer["rope_dim"]
    if factor <= 1:
        return {}
    mscale = (math.sqrt(mixer["scale"] * math.sqrt(width)) - 1) / (0.1 * math.log(factor))
    return {"mscale": round(mscale, 12), "mscale_all_dim": round(mscale, 12)}


def head_fields(m: Layers, *, partial: bool = False) -> Plain:
    """Write the heads of softmax attention and their positions; see `rope_fields`."""
    mixer = m.attention
    names = {
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "head_dim",
    }
    fields = {theirs: mixer.get(ours) for theirs, ours in names.items()}
    return fields | rope_fields(mixer, partial=partial)


def latent_fields(m: Layers) -> Plain:
    """Write multi-head latent attention."""
    mixer = m.latent
    names = {
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_heads",
        "kv_lora_rank": "kv_rank",
        "qk_nope_head_dim": "nope_dim",
        "qk_rope_head_dim": "rope_dim",
        "v_head_dim": "v_dim",
        "head_dim": "rope_dim",
    }
    fields = {theirs: mixer.get(ours) for theirs, ours in names.items()} | rope_fields(mixer)
    return fields | ({"q_lora_rank": mixer["q_rank"]} if mixer else {})


def one_window(m: Layers, **more: Any) -> Plain:
    """Write one window for all layers."""
    return {"sliding_window": m.windows[0], **more}


def typed_windows(m: Layers) -> Plain:
    """Write the window of each layer by `layer_types`."""
    window = next((w for w in m.windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in m.windows]
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": types,
    }


def windows(m: Layers) -> Plain:
    """Write the window of each layer for families without `use_sliding_window`.

    Without windows the size is left out: these families have no null for it.
    """
    fields = typed_windows(m)
    used = fields.pop("use_sliding_window")
    return fields if used else {"layer_types": fields["layer_types"]}


def rope_by_kind(m: Layers, *, partial: bool = False) -> Plain:
    """Write the positions of layers with a window and without one; null: none has positions."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    positions: Plain = {}
    for kind, local in (("full_attention", False), ("sliding_attention", True)):
        of_kind = [x for x in mixers if x.get("rope") and (x.get("window") is not None) == local]
        turned = (x for x in of_kind if x["rope"]["partial_rotary_factor"])
        if mixer := next(turned, None):
            positions[kind] = rope_fields(mixer, partial=partial)["rope_parameters"]
        elif of_kind:
            positions[kind] = None
    return {"rope_parameters": positions}


def heads_alone(m: Layers) -> Plain:
    """Write the heads of softmax attention, without their positions."""
    return {k: v for k, v in head_fields(m).items() if not k.startswith("rope")}


def expert_fields(m: Layers, n_experts: str, d_expert: str, top_k: str) -> Plain:
    """Write the experts by the names of the fields with their number, width and top k."""
    return {
        n_experts: m.experts.get("n_experts"),
        d_expert: m.experts.get("d_expert"),
        top_k: m.router.get("top_k"),
    }


def scaled_weights(m: Layers) -> Plain:
    """Write normalised and scaled weights, and the groups of a selection."""
    groups = m.router.get("selection", {})
    return {
        "norm_topk_prob": m.router.get("normalize"),
        "routed_scaling_factor": m.router.get("scale"),
        "n_group": groups.get("n_groups", 1),
        "topk_group": groups.get("top_groups", 1),
    }


def shared_experts(m: Layers) -> int:
    """Return how many experts of the width of a routed one the canonical shared expert is."""
    shared: int = m.experts.get("d_shared") or 0
    return math.ceil(shared / m.experts["d_expert"]) if shared else 0


def first_dense(m: Layers) -> int:
    """Return how many layers at the start have no experts."""
    return next((i for i, sparse in enumerate(m.sparse) if sparse), len(m.sparse))


def layer_words(m: Layers) -> list[str]:
    """Return what `mlp_layer_types` says of each layer."""
    return ["sparse" if sparse else "dense" for sparse in m.sparse]
