"""Published routers, as the fields that differ from the defaults; former names of fields."""

from __future__ import annotations

from typing import Any

from moenas.records import Plain

FORMER = {
    "score": "score.kind",
    "selection": "selection.kind",
    "n_groups": "selection.n_groups",
    "top_groups": "selection.top_groups",
    "group_score": "selection.group_score",
    "even_groups": "selection.even_groups",
    "top_p": "selection.top_p",
    "sparsemixer_eps": "selection.sparsemixer_eps",
    "logits": "logits.kind",
    "router_input": "logits.input",
    "input_norm": "logits.input_norm",
    "jitter": "logits.jitter",
    "hidden": "logits.hidden",
    "hidden_activation": "logits.hidden_activation",
    "logit_bias": "logits.add_bias",
    "logit_norm": "logits.standardize",
    "logit_scale": "logits.multiplier",
    "logit_cap": "logits.cap",
    "balance": "balance.kind",
    "aux_coef": "balance.coef",
    "aux_scope": "balance.scope",
    "aux_reduce": "loss_reduce",
    "bias_rate": "balance.rate",
}
"""Name that a field of a router had before its components -> its place; see `Component.former`."""


def _aux_loss(coef: float, **fields: Any) -> Plain:
    return {"kind": "aux_loss", "coef": coef, **fields}


# What depends on the number of experts (groups) is left out of the presets. A coefficient is the
# published number, and loss_reduce says of which loss. A router_aux_loss_coef of a released
# configuration belongs to the pooled loss.
_MIXTRAL: Plain = {
    "top_k": 2,
    "normalize": True,
    "balance": _aux_loss(0.02),
    "loss_reduce": "pooled",
}
_DEEPSEEK_V3: Plain = {
    "score": "sigmoid",
    "top_k": 8,
    "normalize": True,
    "scale": 2.5,
    "balance": {"kind": "bias", "rate": 0.001},
}

PRESETS: dict[str, Plain] = {
    # Shazeer et al., arXiv 1701.06538: eq. 3 to 11; k 4 and both losses 0.1.
    "shazeer": {
        "selection": "noisy_top_k",
        "top_k": 4,
        "balance": {"kind": "importance_load", "coef": 0.1},
    },
    # GShard, arXiv 2006.16668, algorithm 1: capacity of 2 slots a token over E experts. Unlike
    # there, the second expert is not dispatched at random, and the loss counts both choices.
    # Capacity is given out token by token, not to all first choices first.
    "gshard": {"top_k": 2, "normalize": True, "capacity_factor": 1.0, "balance": _aux_loss(0.01)},
    # Switch Transformer, arXiv 2101.03961: eq. 2 to 6; capacity 1.25, alpha 1e-2 (without
    # the jitter of the input, which section 2.4 sets to 0.01).
    "switch": {"top_k": 1, "normalize": False, "capacity_factor": 1.25, "balance": _aux_loss(0.01)},
    # ST-MoE, arXiv 2202.08906, section 4: GShard's top 2 with the z-loss.
    "st_moe": {
        "top_k": 2,
        "normalize": True,
        "capacity_factor": 1.25,
        "balance": _aux_loss(0.01),
        "z_coef": 0.001,
    },
    # Mixtral 8x7B, arXiv 2401.04088, section 2.1; coefficient of its released configuration.
    "mixtral": _MIXTRAL,
    # The released configurations of Jamba v0.1, Granite 3.0 MoE, Qwen2-MoE and Qwen3-MoE.
    "jamba": {"top_k": 2, "normalize": False, "balance": _aux_loss(0.001), "loss_reduce": "pooled"},
    "granite": {
        "top_k": 8,
        "normalize": True,
        "balance": _aux_loss(0.001),
        "loss_reduce": "pooled",
    },
    "qwen2_moe": {
        "top_k": 4,
        "normalize": False,
        "balance": _aux_loss(0.001),
        "loss_reduce": "pooled",
    },
    "qwen3_moe": {
        "top_k": 8,
        "normalize": True,
        "balance": _aux_loss(0.001),
        "loss_reduce": "pooled",
    },
    # OLMoE, arXiv 2409.02060, section 2 and table 1; it was trained with MegaBlocks, whose
    # batched_load_balancing_loss is a mean over layers.
    "olmoe": {
        "top_k": 8,
        "normalize": False,
        "balance": _aux_loss(0.01),
        "z_coef": 0.001,
        "loss_reduce": "mean",
    },
    # DeepSeekMoE 16B, arXiv 2401.06066, section 5.1.
    "deepseek_moe": {"top_k": 6, "normalize": False, "balance": _aux_loss(0.001)},
    # DeepSeek-V2, arXiv 2405.04434, section 2.2 (236B: 8 groups of which 3, scale 16).
    "deepseek_v2": {
        "top_k": 6,
        "normalize": False,
        "scale": 16.0,
        "selection": {"kind": "top_k", "group_score": "max"},
        "balance": _aux_loss(0.003, scope="sequence"),
    },
    # DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16 (671B: 8 groups of which 4; without the
    # sequence-wise loss, which balance: bias_and_loss with coef 1e-4 adds).
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
        "logits": {"kind": "linear", "add_bias": True},
        "balance": _aux_loss(0.9),
        "loss_reduce": "pooled",
    },
    # Llama 4, released code: the sigmoid multiplies what goes into the expert.
    "llama4": {
        "score": "sigmoid",
        "top_k": 1,
        "normalize": False,
        "weight_on": "input",
        "balance": _aux_loss(0.001),
    },
    # SmallThinker, arXiv 2507.20984, released code (21B: 6 of 64 experts, 4B: 4 of 32).
    "smallthinker": {
        "score": "sigmoid",
        "top_k": 6,
        "normalize": True,
        "logits": {"kind": "linear", "input": "block"},
    },
    # Gemma 4, released code, which has a logits.multiplier of d_model^-0.5.
    "gemma_4": {
        "normalize": True,
        "expert_scale": True,
        "logits": {"kind": "linear", "input": "stream", "input_norm": True},
    },
    # Phi-3.5-MoE, released configuration and code; also GRIN, arXiv 2409.12136. Not as there:
    # experts are not drawn in training, and the jitter of their input is the router's alone.
    "phi_moe": {
        "top_k": 2,
        "normalize": False,
        "selection": {"kind": "top_k", "sparsemixer_eps": 0.01},
        "logits": {"kind": "linear", "jitter": 0.01},
        "balance": _aux_loss(0.001),
        "loss_reduce": "pooled",
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
