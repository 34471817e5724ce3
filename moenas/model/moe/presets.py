"""Published routers, as the fields that differ from the defaults."""

from __future__ import annotations

from moenas.records import Plain

# What depends on the number of experts (groups) is left out of the presets. An aux_coef is the
# published number, and aux_reduce says of which loss: a router_aux_loss_coef of a released
# configuration is that of the pooled loss.
_MIXTRAL: Plain = {"top_k": 2, "normalize": True, "aux_coef": 0.02, "aux_reduce": "pooled"}
_DEEPSEEK_V3: Plain = {
    "score": "sigmoid",
    "top_k": 8,
    "normalize": True,
    "scale": 2.5,
    "balance": "bias",
    "bias_rate": 0.001,
}

PRESETS: dict[str, Plain] = {
    # Shazeer et al., arXiv 1701.06538: eq. 3 to 11; k 4 and both losses 0.1.
    "shazeer": {
        "selection": "noisy_top_k",
        "top_k": 4,
        "balance": "importance_load",
        "aux_coef": 0.1,
    },
    # GShard, arXiv 2006.16668, algorithm 1: capacity of 2 slots a token over E experts. Not as
    # there: the second expert is not dispatched at random, the loss counts both choices, not
    # the first alone, and capacity is given out token by token, not to all first choices first.
    "gshard": {"top_k": 2, "normalize": True, "capacity_factor": 1.0, "aux_coef": 0.01},
    # Switch Transformer, arXiv 2101.03961: eq. 2 to 6; capacity 1.25, alpha 1e-2 (without
    # the jitter of the input, which section 2.4 sets to 0.01).
    "switch": {"top_k": 1, "normalize": False, "capacity_factor": 1.25, "aux_coef": 0.01},
    # ST-MoE, arXiv 2202.08906, section 4: GShard's top 2 with the z-loss.
    "st_moe": {
        "top_k": 2,
        "normalize": True,
        "capacity_factor": 1.25,
        "aux_coef": 0.01,
        "z_coef": 0.001,
    },
    # Mixtral 8x7B, arXiv 2401.04088, section 2.1; coefficient of its released configuration.
    "mixtral": _MIXTRAL,
    # The released configurations of Jamba v0.1, Granite 3.0 MoE, Qwen2-MoE and Qwen3-MoE.
    "jamba": {"top_k": 2, "normalize": False, "aux_coef": 0.001, "aux_reduce": "pooled"},
    "granite": {"top_k": 8, "normalize": True, "aux_coef": 0.001, "aux_reduce": "pooled"},
    "qwen2_moe": {"top_k": 4, "normalize": False, "aux_coef": 0.001, "aux_reduce": "pooled"},
    "qwen3_moe": {"top_k": 8, "normalize": True, "aux_coef": 0.001, "aux_reduce": "pooled"},
    # OLMoE, arXiv 2409.02060, section 2 and table 1; it was trained with MegaBlocks, whose
    # batched_load_balancing_loss is a mean over layers.
    "olmoe": {
        "top_k": 8,
        "normalize": False,
        "aux_coef": 0.01,
        "z_coef": 0.001,
        "aux_reduce": "mean",
    },
    # DeepSeekMoE 16B, arXiv 2401.06066, section 5.1.
    "deepseek_moe": {"top_k": 6, "normalize": False, "aux_coef": 0.001},
    # DeepSeek-V2, arXiv 2405.04434, section 2.2 (236B: 8 groups of which 3, scale 16).
    "deepseek_v2": {
        "top_k": 6,
        "normalize": False,
        "scale": 16.0,
        "group_score": "max",
        "aux_coef": 0.003,
        "aux_scope": "sequence",
    },
    # DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16 (671B: 8 groups of which 4; without the
    # sequence-wise loss, which balance: bias_and_loss with aux_coef 1e-4 adds).
    "deepseek_v3": _DEEPSEEK_V3,
    # The released configurations of Kimi K2, GLM-4.5 and Nemotron 3 Nano.
    "kimi_k2": _DEEPSEEK_V3 | {"scale": 2.827},
    "glm_4_5": _DEEPSEEK_V3,
    "nemotron_3": _DEEPSEEK_V3 | {"top_k": 6},
    # gpt-oss, released code: a linear layer with bias, softmax over the chosen; coefficient of
    # its released configuration.
    "gpt_oss": {
        "top_k": 4,
        "normalize": True,
        "logit_bias": True,
        "aux_coef": 0.9,
        "aux_reduce": "pooled",
    },
    # Llama 4, released code: the sigmoid multiplies what goes into the expert.
    "llama4": {
        "score": "sigmoid",
        "top_k": 1,
        "normalize": False,
        "weight_on": "input",
        "aux_coef": 0.001,
    },
    # SmallThinker, arXiv 2507.20984, released code (21B: 6 of 64 experts, 4B: 4 of 32).
    "smallthinker": {
        "score": "sigmoid",
        "top_k": 6,
        "normalize": True,
        "router_input": "block",
    },
    # Gemma 4, released code, which has a logit_scale of d_model^-0.5.
    "gemma_4": {
        "normalize": True,
        "expert_scale": True,
        "router_input": "stream",
        "input_norm": True,
    },
    # Phi-3.5-MoE, released configuration and code; also GRIN, arXiv 2409.12136. Not as there:
    # experts are not drawn in training, and the jitter of their input is the router's alone.
    "phi_moe": {
        "top_k": 2,
        "normalize": False,
        "sparsemixer_eps": 0.01,
        "jitter": 0.01,
        "aux_coef": 0.001,
        "aux_reduce": "pooled",
    },
    # LongCat-Flash, arXiv 2509.01322, section 2.1, beside 256 identity experts.
    "longcat": {"top_k": 12, "normalize": False, "scale": 6.0, "balance": "bias"},
    # Expert threshold routing, arXiv 2603.11535: the causal form of expert choice.
    "threshold": {
        "selection": "threshold",
        "score": "sigmoid",
        "normalize": False,
        "balance": "none",
    },
}
