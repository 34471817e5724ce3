"""The zoo's counts against whole models of transformers, built without memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moenas.grammar.sampling import RandomSuggest
from moenas.space.space import Space

hf = pytest.importorskip("transformers")

ZOO = Path(__file__).parents[2] / "spaces" / "zoo"

# The released coordinates, where they are not the defaults of the configuration.
DEEPSEEK_MOE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 102400,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
QWEN3_235B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "head_dim": 128,
    "moe_intermediate_size": 1536,
}
DEEPSEEK_V2: dict[str, Any] = {
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
KIMI_K2: dict[str, Any] = {
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
}
GLM_4_5: dict[str, Any] = {
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
    "use_qk_norm": True,
    "attention_bias": True,
}
GRANITE: dict[str, Any] = {
    "vocab_size": 49155,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": True,
}
QWEN2_57B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
DBRX: dict[str, Any] = {
    "vocab_size": 100352,
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
KIMI_ATTENTION = (4, 8, 12, 16, 20, 24, 27)
KIMI_LINEAR: dict[str, Any] = {
    "layer_types": [
        "full_attention" if i in KIMI_ATTENTION else "linear_attention" for i in range(1, 28)
    ]
}
LFM2_ATTENTION = (2, 6, 10, 14, 18, 21)
LFM2: dict[str, Any] = {
    "num_hidden_layers": 24,
    "layer_types": ["full_attention" if i in LFM2_ATTENTION else "conv" for i in range(24)],
}
GRANITE_4: dict[str, Any] = {
    "vocab_size": 100352,
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "layer_types": ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(40)],
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "shared_intermediate_size": 1024,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
    "mamba_n_heads": 48,
    "mamba_d_state": 128,
    "tie_word_embeddings": True,
}
HUNYUAN_A13B: dict[str, Any] = {
    "vocab_size": 128167,
    "intermediate_size": 3072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 64,
    "moe_topk": 8,
    "tie_word_embeddings": True,
}
DOTS_LLM1: dict[str, Any] = {
    "hidden_size": 4096,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "head_dim": 128,
}
MIXTRAL_8X22B: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
}
MINIMAX_TEXT_01: dict[str, Any] = {
    "vocab_size": 200064,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "head_dim": 128,
    "num_local_experts": 32,
    "layer_types": ["full_attention" if i % 8 == 7 else "linear_attention" for i in range(80)],
}
MAVERICK: dict[str, Any] = {"num_local_experts": 128, "interleave_moe_layer_step": 2}
ARIA: dict[str, Any] = {
    "vocab_size": 100352,
    "hidden_size": 2560,
    "intermediate_size": 1664,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "moe_num_experts": 64,
    "moe_topk": 6,
}
JAMBA_LARGE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "mamba_dt_rank": 512,
    "use_mamba_kernels": False,
}
GRANITE_4_SMALL: dict[str, Any] = GRANITE_4 | {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 768,
    "shared_intermediate_size": 1536,
    "num_local_experts": 72,
    "num_experts_per_tok": 10,
    "mamba_n_heads": 128,
}
MOONLIGHT: dict[str, Any] = {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
QWEN3_CODER: dict[str, Any] = {
    "hidden_size": 6144,
    "num_hidden_layers": 62,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "moe_intermediate_size": 2560,
    "num_experts": 160,
}
TRINITY_MINI: dict[str, Any] = {
    "moe_intermediate_size": 1024,
    "num_dense_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
}
KINDS = {"M": "mamba", "E": "moe", "*": "attention"}
NEMOTRON: dict[str, Any] = {
    "hidden_size": 2688,
    "layers_block_type": [KINDS[c] for c in "MEMEM*" + 4 * "EMEMEM*" + "EMEMEMEM*EMEMEMEME"],
    "num_key_value_heads": 2,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
}
MODELS: dict[str, Callable[[], Any]] = {
    "aria": lambda: hf.AriaTextForCausalLM(hf.AriaTextConfig(**ARIA)),
    "dbrx": lambda: hf.DbrxForCausalLM(hf.DbrxConfig(**DBRX)),
    # DeepSeekMoE has a code of its own; GLM's has the same weights and a selection bias more.
    "deepseek_moe_16b": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**DEEPSEEK_MOE)),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**DEEPSEEK_V2)),
    "deepseek_v2_lite": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**DEEPSEEK_V2_LITE)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config()),
    "dots_llm1": lambda: hf.Dots1ForCausalLM(hf.Dots1Config(**DOTS_LLM1)),
    "ernie_4_5_21b_a3b": lambda: hf.Ernie4_5_MoeForCausalLM(hf.Ernie4_5_MoeConfig()),
    "glm_4_5": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**GLM_4_5)),
    "glm_4_5_air": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(head_dim=128, attention_bias=True)
    ),
    "glm_4_7_flash": lambda: hf.Glm4MoeLiteForCausalLM(hf.Glm4MoeLiteConfig()),
    "gpt_oss_120b": lambda: hf.GptOssForCausalLM(hf.GptOssConfig()),
    "gpt_oss_20b": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    ),
    "granite_3_0_1b_a400m": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**GRANITE)),
    "granite_4_0_h_small": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(**GRANITE_4_SMALL)
    ),
    "granite_4_0_h_tiny": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(**GRANITE_4)
    ),
    "hunyuan_a13b": lambda: hf.HunYuanMoEV1ForCausalLM(hf.HunYuanMoEV1Config(**HUNYUAN_A13B)),
    "jamba_1_5_large": lambda: hf.JambaForCausalLM(hf.JambaConfig(**JAMBA_LARGE)),
    "jamba_v0_1": lambda: hf.JambaForCausalLM(hf.JambaConfig(use_mamba_kernels=False)),
    "kimi_k2": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**KIMI_K2)),
    "kimi_linear_48b_a3b": lambda: hf.KimiLinearForCausalLM(hf.KimiLinearConfig(**KIMI_LINEAR)),
    "lfm2_8b_a1b": lambda: hf.Lfm2MoeForCausalLM(hf.Lfm2MoeConfig(**LFM2)),
    "llama_4_maverick": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**MAVERICK)),
    "llama_4_scout": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig()),
    "mimo_v2_flash": lambda: hf.MiMoV2FlashForCausalLM(hf.MiMoV2FlashConfig()),
    "minimax_m2": lambda: hf.MiniMaxM2ForCausalLM(hf.MiniMaxM2Config()),
    "minimax_text_01": lambda: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(**MINIMAX_TEXT_01)),
    "mixtral_8x22b": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL_8X22B)),
    "mixtral_8x7b": lambda: hf.MixtralForCausalLM(hf.MixtralConfig()),
    "moonlight_16b_a3b": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**MOONLIGHT)),
    "nemotron_3_nano": lambda: hf.NemotronHForCausalLM(hf.NemotronHConfig(**NEMOTRON)),
    "olmoe_1b_7b": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(intermediate_size=1024)),
    "phi_3_5_moe": lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(attention_bias=True, lm_head_bias=True)
    ),
    "qwen1_5_moe_a2_7b": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig()),
    "qwen2_57b_a14b": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN2_57B)),
    "qwen3_235b_a22b": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN3_235B)),
    "qwen3_30b_a3b": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128)
    ),
    "qwen3_5_35b_a3b": lambda: hf.Qwen3_5MoeForCausalLM(hf.Qwen3_5MoeTextConfig()),
    "qwen3_coder_480b_a35b": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN3_CODER)),
    "qwen3_next_80b_a3b": lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig()),
    "solar_open_100b": lambda: hf.SolarOpenForCausalLM(hf.SolarOpenConfig()),
    "trinity_mini": lambda: hf.AfmoeForCausalLM(hf.AfmoeConfig(**TRINITY_MINI)),
}


def counts(model: Any) -> tuple[int, int]:
    """All parameters, and those that a token meets: k of E experts, one row of the embedding.

    A selection bias is not trained by gradients, and no parameter here.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in trained.values())
    routed = [p for name, p in trained.items() if ".experts." in name]
    config = model.config
    if isinstance(config, hf.DbrxConfig):  # a matrix has the rows of all experts
        k, n_experts = config.ffn_config.moe_top_k, config.ffn_config.moe_num_experts
    elif isinstance(config, hf.AriaTextConfig):
        k, n_experts = config.moe_topk, config.moe_num_experts
    else:
        k, n_experts = config.num_experts_per_tok, len(routed[0])
    idle = sum(p.numel() - p.numel() * k // n_experts for p in routed)
    embedding = model.get_input_embeddings().weight
    rows = 0 if config.tie_word_embeddings else len(embedding) - 1
    return total, total - idle - rows * embedding.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_counts_are_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    space = Space.load(ZOO / f"{name}.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert (cost.params, cost.active_params) == counts(model)


SWITCH = "switch_base_8"


@pytest.mark.slow
def test_the_counts_of_switch_are_those_of_its_decoder() -> None:
    sizes = {"num_layers": 12, "num_decoder_layers": 12, "num_sparse_decoder_layers": 6}
    config = hf.SwitchTransformersConfig(**sizes, d_ff=3072)
    with torch.device("meta"):
        decoder = hf.SwitchTransformersForConditionalGeneration(config).decoder
    left_out = ("EncDecAttention", "layer.1.layer_norm")
    weights = {n: p for n, p in decoder.named_parameters() if not any(x in n for x in left_out)}
    idle = sum(p.numel() for n, p in weights.items() if ".experts." in n) * 7 // 8
    space = Space.load(ZOO / f"{SWITCH}.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert cost.params == sum(p.numel() for p in weights.values())
    assert cost.active_params == cost.params - idle


LONGCAT = "longcat_flash"


@pytest.mark.slow
def test_the_counts_of_longcat_are_those_of_its_networks() -> None:
    with torch.device("meta"):
        model = hf.LongcatFlashForCausalLM(hf.LongcatFlashConfig())
    config = model.config
    networks, choices = config.n_routed_experts, config.n_routed_experts + config.zero_expert_num
    # The definition has an up projection for each identity expert, too, which nothing reads.
    unread = sum(
        p[networks:].numel() for n, p in model.named_parameters() if n.endswith("gate_up_proj")
    )
    total = sum(p.numel() for p in model.parameters()) - unread
    routed = [p[:networks] for n, p in model.named_parameters() if ".experts." in n]
    idle = sum(p.numel() - p.numel() * config.num_experts_per_tok // choices for p in routed)
    rows = (config.vocab_size - 1) * config.hidden_size
    space = Space.load(ZOO / f"{LONGCAT}.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert (cost.params, cost.active_params) == (total, total - idle - rows)


JETMOE = "jetmoe_8b"


@pytest.mark.slow
def test_the_counts_of_jetmoe_are_those_of_heads_and_networks() -> None:
    with torch.device("meta"):
        model = hf.JetMoeForCausalLM(hf.JetMoeConfig(num_hidden_layers=24))
    weights = dict(model.named_parameters())
    routed = ("input_linear.weight", "output_linear.weight")
    idle = sum(p.numel() - p.numel() * 2 // 8 for n, p in weights.items() if n.endswith(routed))
    space = Space.load(ZOO / f"{JETMOE}.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert cost.params == sum(p.numel() for p in weights.values())
    assert cost.active_params == cost.params - idle
