"""Exports with biases, without windows, experts or attention: they load, or they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from test_exports import (
    ATTENTION,
    BIASED,
    DENSE,
    EXPERTS,
    LATENT,
    check_with_transformers,
    family_of,
    written,
)

from moenas.errors import InputError
from moenas.huggingface.family_matching import differences, layers_of_architecture, written_config
from moenas.model.architecture import Architecture
from moenas.records import Plain


def model(*blocks: Plain, **whole: Any) -> Architecture:
    return Architecture.parse({"vocab_size": 256, "d_model": 32, **whole, "blocks": [*blocks]})


def block(mixer: Plain | None, ffn: Plain | None, **more: Any) -> Plain:
    return {"mixer": mixer, "ffn": ffn, **more}


STILL: Plain = {"rope": {"partial_rotary_factor": 0}}
BIASES: Plain = {"qkv_bias": True, "out_bias": True}
NARROW = ATTENTION | {"head_dim": 8}
NORMED = ATTENTION | {"qk_norm": "head"}
GATED = NORMED | {"output_gate": "element"}
SOFTPLUS = GATED | {"gate_activation": "softplus"}
GEMMA = NORMED | {"v_norm": True, "scale": 1.0}
SINKS = NARROW | {"sinks": True, "scale": 0.3}
WIDE: Plain = {"n_shared_experts": 1, "d_shared": 40}
SIGMOID = EXPERTS | {"router": BIASED | {"top_k": 2}}
SOFTMAX = EXPERTS | {"router": {"top_k": 2, "normalize": True}}
NO_BIAS = SIGMOID | WIDE | {"router": {"score": "sigmoid", "top_k": 2, "normalize": True}}
ON_LOGITS = SIGMOID | WIDE | {"router": BIASED | {"top_k": 2, "bias_on": "logits"}}
GELU = DENSE | {"activation": "geglu_tanh"}
OAI: Plain = {"gate_limit": 7.0, "gate_alpha": 1.702, "up_shift": 1.0}
MAMBA: Plain = {"kind": "mamba", "d_inner": 64, "d_state": 6, "dt_rank": 3, "inner_norm": True}
MAMBA_2: Plain = {"kind": "mamba2", "n_heads": 4, "head_dim": 16, "d_state": 6, "inner_eps": 1e-6}
OTHER_BIASES: Plain = {"proj_bias": True, "conv_bias": False}
CONV: Plain = {"kind": "short_conv", "bias": True, "d_conv": 4}
KIMI: Plain = {"kind": "kimi_delta", "n_heads": 4, "key_dim": 8, "value_dim": 8, "rank": 8}
BOUNDED = KIMI | {"decay_limit": 5.0, "rank": None}
DELTA: Plain = {"kind": "gated_delta", "n_heads": 4, "n_key_heads": 2, "key_dim": 8, "value_dim": 8}
FACTORS: Plain = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.5,
    "logit_multiplier": 0.25,
}
GEMMA_WHOLE: Plain = {"norm_position": "sandwich", "embedding_multiplier": 32**0.5}
RELU2: Plain = {"activation": "relu2"}

WRITTEN: dict[str, tuple[str, Architecture]] = {
    "dense Granite 4.0 with positions and biases": (
        "granitemoehybrid",
        model(
            block(MAMBA_2 | OTHER_BIASES, DENSE),
            block(NARROW | BIASES | {"scale": 0.3}, DENSE),
            **FACTORS,
        ),
    ),
    "Granite 4.0 with positions": (
        "granitemoehybrid",
        model(block(MAMBA_2, SOFTMAX | WIDE), block(NARROW | {"scale": 0.3}, SOFTMAX | WIDE)),
    ),
    "dense Jamba with one layer of attention": (
        "jamba",
        model(
            block(MAMBA | OTHER_BIASES, DENSE),
            block(ATTENTION | STILL, DENSE),
            block(MAMBA | OTHER_BIASES, DENSE),
        ),
    ),
    "LFM2 with biases": (
        "lfm2_moe",
        model(block(CONV, DENSE), block(NARROW | {"qk_norm": "head"}, SIGMOID)),
    ),
    "Nemotron-H with biases and a network": (
        "nemotron_h",
        model(
            block(MAMBA_2 | {"proj_bias": True}, None),
            block(None, DENSE | RELU2),
            block(ATTENTION | STILL, SIGMOID | WIDE | RELU2),
            tie_embeddings=False,
        ),
    ),
    "Kimi Linear without shared experts": (
        "kimi_linear",
        model(
            block(KIMI, DENSE),
            block(LATENT | STILL | {"q_rank": None}, SIGMOID),
            tie_embeddings=False,
        ),
    ),
    "Kimi Linear with queries of low rank": (
        "kimi_linear",
        model(
            block(KIMI, DENSE),
            block(LATENT | STILL, SIGMOID),
            tie_embeddings=False,
        ),
    ),
    "Trinity without shared experts": (
        "afmoe",
        model(
            block(GATED | {"window": 5}, DENSE),
            block(GATED | STILL, SIGMOID),
            norm_position="sandwich",
        ),
    ),
    "Trinity without windows": (
        "afmoe",
        model(block(GATED | STILL, DENSE), norm_position="sandwich"),
    ),
    "Laguna with biases and without windows": (
        "laguna",
        model(block(SOFTPLUS | BIASES, DENSE), block(SOFTPLUS | BIASES, SIGMOID | WIDE)),
    ),
    "Flint with biases": (
        "flint",
        model(
            block(NORMED | BIASES | {"sinks": True, "window": 4}, NO_BIAS),
            block(NORMED | BIASES | STILL | {"sinks": True}, NO_BIAS),
        ),
    ),
    "Flint without windows": (
        "flint",
        model(block(NORMED | STILL | {"sinks": True}, NO_BIAS)),
    ),
    "Beam with biases and without windows": (
        "beam",
        model(
            block(GATED | BIASES | {"gate_bias": True}, SIGMOID),
            norm_position="sandwich",
            depth_scale=True,
        ),
    ),
    "MiMo-V2-Flash without dense layers": (
        "mimo_v2_flash",
        model(
            block(ATTENTION | {"v_head_dim": 8}, SIGMOID),
            block(
                ATTENTION | {"v_head_dim": 8, "n_kv_heads": 4, "window": 5, "sinks": True}, SIGMOID
            ),
        ),
    ),
    "MiMo-V2-Flash without windows": (
        "mimo_v2_flash",
        model(block(ATTENTION | {"v_head_dim": 8}, DENSE)),
    ),
    "Granite with windows and biases": (
        "granitemoe_swa",
        model(
            block(SINKS | BIASES | {"window": 4}, SOFTMAX | WIDE),
            block(SINKS | BIASES | {"rope": {"theta": 77.0}}, SOFTMAX | WIDE),
        ),
    ),
    "Granite with sinks, without windows and shared networks": (
        "granitemoe_swa",
        model(block(SINKS, SOFTMAX)),
    ),
    "Gemma 4 with biases": (
        "gemma4_text",
        model(
            block(GEMMA | BIASES | {"window": 5}, GELU, block_scale=True),
            block(GEMMA | BIASES, GELU, block_scale=True),
            **GEMMA_WHOLE,
        ),
    ),
    "Gemma 4 without windows": (
        "gemma4_text",
        model(block(GEMMA, GELU, block_scale=True), **GEMMA_WHOLE),
    ),
    "MiniMax-M3 without dense layers": (
        "minimax_m3_vl_text",
        model(block(NORMED, SIGMOID | WIDE | OAI)),
    ),
    "A.X K1 without shared experts": (
        "axk1",
        model(block(LATENT, DENSE), block(LATENT, SIGMOID, ffn_norm="sandwich")),
    ),
    "Command A without windows": (
        "cohere2_moe",
        model(block(ATTENTION | STILL, SOFTMAX, parallel=True), norm="layernorm"),
    ),
    "gpt-oss without windows": (
        "gpt_oss",
        model(
            block(
                ATTENTION | BIASES | {"sinks": True},
                SOFTMAX
                | OAI
                | {"expert_bias": True}
                | {
                    "router": {
                        "top_k": 2,
                        "normalize": True,
                        "logits": {"kind": "linear", "add_bias": True},
                    }
                },
            )
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", WRITTEN)
def test_an_unusual_member_of_a_family_loads_with_the_same_logits(
    name: str, tmp_path: Path
) -> None:
    family, architecture = WRITTEN[name]
    out, ours = written(tmp_path, architecture)
    assert family_of(out) == family
    check_with_transformers(out, ours)


REFUSED: dict[str, tuple[str, Architecture, str]] = {
    # transformers runs no model without a layer of attention: its cache counts no tokens there.
    "Granite 4.0": ("granitemoehybrid", model(block(MAMBA_2, DENSE)), "attention layers"),
    "Jamba": ("jamba", model(block(MAMBA, DENSE)), "attention layers"),
    "Nemotron-H": (
        "nemotron_h",
        model(block(MAMBA_2, SIGMOID | WIDE | RELU2), tie_embeddings=False),
        "attention layers",
    ),
    "Kimi Linear": (
        "kimi_linear",
        model(block(KIMI, DENSE), tie_embeddings=False),
        "attention layers",
    ),
    "Ling hybrid": (
        "bailing_hybrid",
        model(
            block(BOUNDED, DENSE),
            block(LATENT | {"output_gate": "head"}, SIGMOID),
            tie_embeddings=False,
        ),
        "mixer.q_rank is 24, the family has null",
    ),
    "Qwen3-Next": (
        "qwen3_next",
        model(block(DELTA, SOFTMAX | WIDE | {"shared_gate": True})),
        "attention layers",
    ),
    # These families have no null for the size of a window, and none without one has positions.
    "K-EXAONE": ("exaone_moe", model(block(NORMED, SIGMOID)), "partial_rotary_factor"),
    "Kolibri 1": (
        "kolibri1",
        model(block(NORMED, ON_LOGITS), norm_position="sandwich"),
        "partial_rotary_factor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_cannot_run_is_not_written(name: str, tmp_path: Path) -> None:
    family, architecture, what = REFUSED[name]
    layers = layers_of_architecture(architecture)
    unequal = differences(layers, family, written_config(family, layers, 64))
    assert any(what in str(difference) for difference in unequal)
    if what == "attention layers":
        with pytest.raises(InputError, match="the number of attention layers is 0"):
            written(tmp_path, architecture)
