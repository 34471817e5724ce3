"""How the families of Hugging Face name the weights of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

Weights: TypeAlias = "dict[str, Tensor]"
Named: TypeAlias = "Iterator[tuple[str, Tensor]]"

# Shapes: E experts, D model width, F width of a network.


def two_norms(
    mixer: str = "input_layernorm", ffn: str = "post_attention_layernorm"
) -> Mapping[str, str]:
    """Return the names of the norms of the mixer and of the feed-forward layer."""
    return {"norm1": mixer, "norm2": ffn}


def four_norms(*names: str) -> Mapping[str, str]:
    """Return the names of the norms before and after the mixer, before and after the network."""
    ours = ("norm1.before", "norm1.after", "norm2.before", "norm2.after")
    return dict(zip(ours, names, strict=True))


@dataclass(frozen=True)
class Layout:
    """The names of a family, below the prefix of a layer; a prefix ends with a dot."""

    root: str = "model."
    """Prefix of all weights but those of the head."""
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    """The norm before the head."""
    norms: Mapping[str, str] = field(default_factory=two_norms)
    """Norm of ours -> its name."""
    one_part: bool = False
    """Whether each layer is a mixer or a feed-forward layer alone."""
    mixer: str | None = None
    """Prefix of every mixer; None: each kind has its own."""
    out: str = "o_proj"
    """The output of attention."""
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    sinks: str = "sinks"
    output_gate: str = "g_proj"
    dense: str = "mlp."
    experts: str = "mlp."
    """Prefix of a mixture of experts."""
    router: str = "gate"
    """The router, below the prefix of the mixture."""
    bias: str | None = None
    """The bias of the selection."""
    network: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Gate, value and output of a network; two: without a gate, or with both in one matrix."""
    expert: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Gate, value and output of an expert; two: without a gate."""
    shared: str = "mlp.shared_experts."
    stacks: Callable[[Layout, Weights], Named] | None = None
    """Writes the experts as stacked matrices; None: a matrix for each expert."""
    neighbours: bool = False
    """Whether rotary positions turn pairs of neighbours; ours turn pairs of halves."""
    norm_bias: bool = False
    """Whether every norm has a bias; without one of ours it is 0."""
    indexer_neighbours: bool = False
    """Whether those of a token indexer do."""
    from_one: bool = False
    """Whether the weight of a norm is written as its distance from 1."""
    gated_queries: bool = False
    """Whether each head has its queries and then its gates in one matrix."""
    rates: tuple[int, ...] = (-1,)
    """Shape of the decay rates of Kimi delta attention."""
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


def turned_stacks(layout: Layout, part: Weights) -> Named:
    """Yield stacks as transformers itself has them, (E, 2 F, D) and (E, D, F)."""
    yield layout.experts + "experts.gate_up_proj", part.pop("experts.up").mT
    yield layout.experts + "experts.down_proj", part.pop("experts.down").mT


def linear_stacks(layout: Layout, part: Weights) -> Named:
    """Yield Granite's stacks, (E, 2 F, D) and (E, D, F)."""
    yield layout.experts + "input_linear.weight", part.pop("experts.up").mT
    yield layout.experts + "output_linear.weight", part.pop("experts.down").mT


def alternating(x: Tensor) -> Tensor:
    """Return two halves of the last dimension as alternating elements."""
    first, second = x.chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


BIASED = Layout(bias="mlp.gate.e_score_correction_bias", writes_no_shared=True)
MIXTRAL = Layout(experts="block_sparse_moe.", expert=("w1", "w3", "w2"))
ONE_SHARED = Layout(shared="mlp.shared_expert.")
LATENT = replace(BIASED, neighbours=True)
GRANITE = Layout(
    dense="shared_mlp.",
    experts="block_sparse_moe.",
    router="router.layer",
    network=("input_linear", "output_linear"),
    shared="shared_mlp.",
    stacks=linear_stacks,
)
FEED_FORWARD_NORMS = four_norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
LAYOUTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe"), Layout()),
    "mixtral": MIXTRAL,
    "phimoe": replace(MIXTRAL, norm_bias=True),
    "stablelm": Layout(norm_bias=True),
    "qwen2_moe": ONE_SHARED,
    "flex_olmo": Layout(norms=two_norms("post_attention_layernorm", "post_feedforward_layernorm")),
    "granitemoe": GRANITE,
    "gpt_oss": Layout(router="router", stacks=gate_up),
    "glm4_moe": BIASED,
    "dots1": BIASED,
    "deepseek_v3": LATENT,
    "deepseek_v2": replace(LATENT, bias=None),
    "glm4_moe_lite": LATENT,
    "minimax_m2": replace(MIXTRAL, bias="block_sparse_moe.e_score_correction_bias"),
    "ernie4_5_moe": Layout(bias="mlp.moe_statics.e_score_correction_bias", neighbours=True),
    "hunyuan_v1_moe": Layout(
        qk_norms=("query_layernorm", "key_layernorm"), router="gate.wg", shared="mlp.shared_mlp."
    ),
    "qwen3_next": replace(ONE_SHARED, from_one=True, gated_queries=True),
    "llama4_text": Layout(
        dense="feed_forward.",
        experts="feed_forward.",
        router="router",
        shared="feed_forward.shared_expert.",
        stacks=plain_stacks,
        neighbours=True,
    ),
    "deepseek_v32": LATENT,
    "glm_moe_dsa": replace(LATENT, indexer_neighbours=True),
    "exaone_moe": replace(BIASED, bias="mlp.e_score_correction_bias"),
    "hy_v3": replace(
        BIASED, router="router.gate", bias="mlp.expert_bias", shared="mlp.shared_mlp."
    ),
    "mellum": Layout(),
    "granitemoeshared": GRANITE,
    "granitemoe_swa": replace(GRANITE, router="router", stacks=turned_stacks),
    "granitemoehybrid": GRANITE,
    "jamba": Layout(
        final_norm="final_layernorm",
        norms=two_norms(ffn="pre_ff_layernorm"),
        dense="feed_forward.",
        experts="feed_forward.",
        router="router",
    ),
    "minimax_m3_vl_text": replace(
        BIASED, network=("gate_up_proj", "down_proj"), stacks=turned_stacks, from_one=True
    ),
    "gemma4_text": Layout(
        norms=FEED_FORWARD_NORMS, experts="", router="router.proj", stacks=turned_stacks
    ),
    "flint": replace(ONE_SHARED, sinks="softmax_offset"),
    "laguna": replace(ONE_SHARED, bias="mlp.experts.e_score_correction_bias"),
    "kolibri1": Layout(
        norms=four_norms(
            "input_layernorm",
            "post_attn_norm",
            "post_attention_layernorm",
            "post_ffn_norm",
        ),
        bias="moe.router.expert_bias",
    ),
    "beam": replace(
        BIASED, norms=FEED_FORWARD_NORMS, output_gate="gate_proj", writes_no_shared=False
    ),
    "mimo_v2_flash": replace(BIASED, sinks="attention_sink_bias", writes_no_shared=False),
    "afmoe": Layout(
        norms=four_norms(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_mlp_layernorm",
            "post_mlp_layernorm",
        ),
        output_gate="gate_proj",
        router="router.gate",
        bias="mlp.expert_bias",
        writes_no_shared=True,
    ),
    "cohere2_moe": Layout(neighbours=True),
    "lfm2_moe": Layout(
        final_norm="embedding_norm",
        norms=two_norms("operator_norm", "ffn_norm"),
        out="out_proj",
        qk_norms=("q_layernorm", "k_layernorm"),
        dense="feed_forward.",
        experts="feed_forward.",
        bias="feed_forward.expert_bias",
        network=("w1", "w3", "w2"),
        expert=("w1", "w3", "w2"),
    ),
    "axk1": replace(
        LATENT,
        norms={
            **two_norms(),
            "norm2.before": "post_attention_layernorm",
            "norm2.after": "post_mlp_layernorm",
        },
    ),
    "nemotron_h": Layout(
        root="backbone.",
        embedding="embeddings",
        final_norm="norm_f",
        one_part=True,
        norms=two_norms("norm", "norm"),
        mixer="mixer.",
        dense="mixer.",
        experts="mixer.",
        bias="mixer.gate.e_score_correction_bias",
        network=("up_proj", "down_proj"),
        expert=("up_proj", "down_proj"),
        shared="mixer.shared_experts.",
    ),
    "kimi_linear": replace(
        MIXTRAL,
        dense="block_sparse_moe.",
        bias="block_sparse_moe.gate.e_score_correction_bias",
        shared="block_sparse_moe.shared_experts.",
        rates=(1, 1, -1, 1),
        writes_no_shared=True,
    ),
    "bailing_hybrid": replace(
        LATENT,
        embedding="word_embeddings",
        mixer="attention.",
        out="dense",
        bias="mlp.gate.expert_bias",
    ),
}
"""`model_type` -> the names of its weights, as its released files have them."""
