"""From an architecture to the config.json of a family: the way back of its reader.

A writer fills every field of its family from the parts that it finds. What the family lacks it
leaves out: `matching` reads the result back and compares, so a writer need not refuse anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


# --- fields that many families have ---------------------------------------------------------------


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


# --- families -------------------------------------------------------------------------------------


def llama(m: Layers) -> Plain:
    """Llama."""
    return {
        **whole_fields(m),
        **head_fields(m),
        "intermediate_size": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def mistral(m: Layers) -> Plain:
    """Mistral: every layer may have the same window."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **one_window(m),
        "intermediate_size": m.dense.get("d_ff"),
    }


def stablelm(m: Layers) -> Plain:
    """StableLM 2."""
    return {
        **whole_fields(m, "layer_norm_eps"),
        **{k: v for k, v in head_fields(m, partial=True).items() if k != "head_dim"},
        "intermediate_size": m.dense.get("d_ff"),
        "use_qkv_bias": m.attention.get("qkv_bias", False),
        "use_parallel_residual": m.blocks[0]["parallel"],
        "qk_layernorm": False,
    }


def qwen2(m: Layers) -> Plain:
    """Qwen2."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **typed_windows(m),
        "intermediate_size": m.dense.get("d_ff"),
    }


def qwen3(m: Layers) -> Plain:
    """Qwen3."""
    return {**qwen2(m), "attention_bias": m.attention.get("qkv_bias", False)}


def mixtral(m: Layers) -> Plain:
    """Mixtral."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **one_window(m),
        **expert_fields(m, "num_local_experts", "intermediate_size", "num_experts_per_tok"),
    }


def _sparse_layers(m: Layers) -> Plain:
    """Write which layers have experts, as the mixtures of Qwen do."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(m.sparse) if not sparse],
        "intermediate_size": m.dense.get("d_ff"),
        "norm_topk_prob": m.router.get("normalize"),
        **expert_fields(m, "num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    }


def qwen3_moe(m: Layers) -> Plain:
    """Qwen3-MoE."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **one_window(m, use_sliding_window=m.windows[0] is not None),
        **_sparse_layers(m),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def qwen2_moe(m: Layers) -> Plain:
    """Qwen2-MoE."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **typed_windows(m),
        **_sparse_layers(m),
        "qkv_bias": m.attention.get("qkv_bias", False),
        "shared_expert_intermediate_size": m.experts.get("d_shared"),
    }


def olmoe(m: Layers) -> Plain:
    """OLMoE and FlexOlmo."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "num_experts", "intermediate_size", "num_experts_per_tok"),
        "norm_topk_prob": m.router.get("normalize"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def phimoe(m: Layers) -> Plain:
    """Phi-3.5-MoE."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **one_window(m),
        **expert_fields(m, "num_local_experts", "intermediate_size", "num_experts_per_tok"),
        "attention_bias": m.attention.get("qkv_bias", False),
        "lm_head_bias": m.whole["head_bias"],
        "router_jitter_noise": m.router.get("selection", {}).get("sparsemixer_eps"),
        "num_experts_per_tok": 2,  # the code chooses two, whatever the field says
    }


def granitemoe(m: Layers) -> Plain:
    """Granite 3.0 MoE."""
    mixer = m.attention
    scale = mixer.get("scale") or mixer.get("head_dim", 1) ** -0.5
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "num_local_experts", "intermediate_size", "num_experts_per_tok"),
        "attention_bias": mixer.get("qkv_bias", False),
        "attention_multiplier": scale,
        "embedding_multiplier": m.whole["embedding_multiplier"],
        "residual_multiplier": m.whole["residual_multiplier"],
        "logits_scaling": 1 / m.whole["logit_multiplier"],
    }


def gpt_oss(m: Layers) -> Plain:
    """gpt-oss."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **{k: v for k, v in typed_windows(m).items() if k != "use_sliding_window"},
        **expert_fields(m, "num_local_experts", "intermediate_size", "num_experts_per_tok"),
        "attention_bias": m.attention.get("qkv_bias", False),
        "swiglu_limit": m.experts.get("gate_limit"),
    }


def _biased_experts(m: Layers) -> Plain:
    """Write experts chosen by sigmoid scores with a bias, after the first dense layers."""
    return {
        **expert_fields(m, "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
        **scaled_weights(m),
        "n_shared_experts": shared_experts(m),
        "first_k_dense_replace": first_dense(m),
        "intermediate_size": m.dense.get("d_ff"),
    }


def glm4_moe(m: Layers) -> Plain:
    """GLM-4.5."""
    return {
        **whole_fields(m),
        **head_fields(m, partial=True),
        **_biased_experts(m),
        "attention_bias": m.attention.get("qkv_bias", False),
        "use_qk_norm": m.attention.get("qk_norm") == "head",
    }


def dots1(m: Layers) -> Plain:
    """dots.llm1."""
    windows = {k: v for k, v in typed_windows(m).items() if v is not None}
    return {
        **whole_fields(m),
        **head_fields(m),
        **_biased_experts(m),
        **windows,
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def deepseek_v3(m: Layers) -> Plain:
    """DeepSeek-V3."""
    return {**whole_fields(m), **latent_fields(m), **_biased_experts(m)}


def glm4_moe_lite(m: Layers) -> Plain:
    """GLM-4.7-Flash: DeepSeek-V3's parts, and the kind of each layer by name."""
    fields = {**deepseek_v3(m), "mlp_layer_types": layer_words(m)}
    return {k: v for k, v in fields.items() if k != "first_k_dense_replace"}


def layer_words(m: Layers) -> list[str]:
    """Return what `mlp_layer_types` says of each layer."""
    return ["sparse" if sparse else "dense" for sparse in m.sparse]


def deepseek_v2(m: Layers) -> Plain:
    """DeepSeek-V2."""
    groups = m.router.get("selection", {}).get("n_groups", 1)
    method = "greedy" if groups == 1 else "group_limited_greedy"
    fields = {**whole_fields(m), **latent_fields(m), **_biased_experts(m), "topk_method": method}
    return {**fields, "norm_topk_prob": False}


def minimax_m2(m: Layers) -> Plain:
    """MiniMax-M2."""
    mixer, turning = m.attention, {}
    if mixer:
        turning["rotary_dim"] = round(mixer["head_dim"] * mixer["rope"]["partial_rotary_factor"])
    return {
        **whole_fields(m),
        **head_fields(m, partial=True),
        **turning,
        **expert_fields(m, "num_local_experts", "intermediate_size", "num_experts_per_tok"),
    }


def ernie4_5_moe(m: Layers) -> Plain:
    """ERNIE 4.5."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "moe_num_experts", "moe_intermediate_size", "moe_k"),
        "intermediate_size": m.dense.get("d_ff"),
        "moe_num_shared_experts": shared_experts(m),
        "moe_layer_start_index": first_dense(m),
        "moe_layer_interval": 1,
    }


def hunyuan_v1_moe(m: Layers) -> Plain:
    """Hunyuan-A13B."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "num_experts", "intermediate_size", "moe_topk"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


WRITERS: dict[str, tuple[str, Callable[[Layers], Plain]]] = {
    "llama": ("LlamaForCausalLM", llama),
    "mistral": ("MistralForCausalLM", mistral),
    "stablelm": ("StableLmForCausalLM", stablelm),
    "qwen3": ("Qwen3ForCausalLM", qwen3),
    "qwen2": ("Qwen2ForCausalLM", qwen2),
    "mixtral": ("MixtralForCausalLM", mixtral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", qwen3_moe),
    "olmoe": ("OlmoeForCausalLM", olmoe),
    "qwen2_moe": ("Qwen2MoeForCausalLM", qwen2_moe),
    "flex_olmo": ("FlexOlmoForCausalLM", olmoe),
    "granitemoe": ("GraniteMoeForCausalLM", granitemoe),
    "phimoe": ("PhimoeForCausalLM", phimoe),
    "gpt_oss": ("GptOssForCausalLM", gpt_oss),
    "deepseek_v3": ("DeepseekV3ForCausalLM", deepseek_v3),
    "deepseek_v2": ("DeepseekV2ForCausalLM", deepseek_v2),
    "glm4_moe": ("Glm4MoeForCausalLM", glm4_moe),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", glm4_moe_lite),
    "dots1": ("Dots1ForCausalLM", dots1),
    "minimax_m2": ("MiniMaxM2ForCausalLM", minimax_m2),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", ernie4_5_moe),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", hunyuan_v1_moe),
}
"""`model_type` -> the class of transformers and the writer, in the order of preference."""
