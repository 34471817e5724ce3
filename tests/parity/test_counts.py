"""The zoo's counts against whole models of transformers, built without memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moenas.draws import RandomSuggest
from moenas.space import Space

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
    # DeepSeekMoE has a code of its own; GLM's has the same weights and a selection bias more.
    "deepseek_moe_16b": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**DEEPSEEK_MOE)),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**DEEPSEEK_V2)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config()),
    "glm_4_5": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**GLM_4_5)),
    "gpt_oss_120b": lambda: hf.GptOssForCausalLM(hf.GptOssConfig()),
    "gpt_oss_20b": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    ),
    "granite_3_0_1b_a400m": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**GRANITE)),
    "jamba_v0_1": lambda: hf.JambaForCausalLM(hf.JambaConfig(use_mamba_kernels=False)),
    "kimi_k2": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**KIMI_K2)),
    "llama_4_scout": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig()),
    "mixtral_8x7b": lambda: hf.MixtralForCausalLM(hf.MixtralConfig()),
    "nemotron_3_nano": lambda: hf.NemotronHForCausalLM(hf.NemotronHConfig(**NEMOTRON)),
    "olmoe_1b_7b": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(intermediate_size=1024)),
    "qwen3_235b_a22b": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN3_235B)),
    "qwen3_30b_a3b": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128)
    ),
}


def counts(model: Any) -> tuple[int, int]:
    """All parameters, and those that a token meets: k of E experts, one row of the embedding."""
    total = sum(p.numel() for p in model.parameters())
    routed = [p for name, p in model.named_parameters() if ".experts." in name]
    config = model.config
    idle = sum(p.numel() - p.numel() * config.num_experts_per_tok // len(p) for p in routed)
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
    left_out = ("EncDecAttention", "layer.1.layer_norm", "relative_attention_bias")
    weights = {n: p for n, p in decoder.named_parameters() if not any(x in n for x in left_out)}
    idle = sum(p.numel() for n, p in weights.items() if ".experts." in n) * 7 // 8
    space = Space.load(ZOO / f"{SWITCH}.yaml")
    cost = space.cost(space.architecture(space.draw(RandomSuggest(0))))
    assert cost.params == sum(p.numel() for p in weights.values())
    assert cost.active_params == cost.params - idle
