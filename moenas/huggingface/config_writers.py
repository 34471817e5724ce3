"""From an architecture to the config.json of a family: the way back of its reader.

A writer fills every field of its family from the parts that it finds. What the family lacks it
leaves out: `matching` reads the result back and compares, so a writer need not refuse anything.
"""

from __future__ import annotations

from collections.abc import Callable

from moenas.huggingface import hybrid_writers, recent_writers, windowed_writers
from moenas.huggingface.layer_fields import (
    Layers,
    expert_fields,
    first_dense,
    head_fields,
    latent_fields,
    layer_words,
    one_window,
    scaled_weights,
    shared_experts,
    typed_windows,
    whole_fields,
    windows,
)
from moenas.records import Plain

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
    shared = windowed_writers.granitemoeshared(m)
    return {k: v for k, v in shared.items() if k != "shared_intermediate_size"}


def gpt_oss(m: Layers) -> Plain:
    """gpt-oss."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **windows(m),
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
    "qwen3_next": ("Qwen3NextForCausalLM", recent_writers.qwen3_next),
    "llama4_text": ("Llama4ForCausalLM", recent_writers.llama4_text),
    "deepseek_v32": ("DeepseekV32ForCausalLM", recent_writers.indexed),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", recent_writers.glm_moe_dsa),
    "exaone_moe": ("ExaoneMoeForCausalLM", recent_writers.exaone_moe),
    "hy_v3": ("HYV3ForCausalLM", recent_writers.hy_v3),
    "mellum": ("MellumForCausalLM", windowed_writers.mellum),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", windowed_writers.granitemoeshared),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", windowed_writers.granitemoe_swa),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", hybrid_writers.granitemoehybrid),
    "jamba": ("JambaForCausalLM", hybrid_writers.jamba),
    "lfm2_moe": ("Lfm2MoeForCausalLM", hybrid_writers.lfm2_moe),
    "minimax_m3_vl_text": ("MiniMaxM3VLForCausalLM", windowed_writers.minimax_m3_vl_text),
    "gemma4_text": ("Gemma4ForCausalLM", windowed_writers.gemma4_text),
    "flint": ("FlintForCausalLM", windowed_writers.flint),
    "laguna": ("LagunaForCausalLM", windowed_writers.laguna),
    "kolibri1": ("Kolibri1ForCausalLM", windowed_writers.kolibri1),
    "beam": ("BeamForCausalLM", windowed_writers.beam),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", windowed_writers.mimo_v2_flash),
    "afmoe": ("AfmoeForCausalLM", windowed_writers.afmoe),
    "cohere2_moe": ("Cohere2MoeForCausalLM", windowed_writers.cohere2_moe),
    "axk1": ("AXK1ForCausalLM", recent_writers.axk1),
    "nemotron_h": ("NemotronHForCausalLM", hybrid_writers.nemotron_h),
    "kimi_linear": ("KimiLinearForCausalLM", hybrid_writers.kimi_linear),
    "bailing_hybrid": ("BailingHybridForCausalLM", hybrid_writers.bailing_hybrid),
}
"""`model_type` -> the class of transformers and the writer, in the order of preference."""
