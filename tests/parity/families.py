"""Published families, small: what makes the file of the zoo small, and their model of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import Tensor
from weights import (
    Row,
    halves,
    same,
    squeezed,
    stacked,
    transposed,
    turned,
)

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 256, 32, 4, 2, 16
LAYER = "model.layers.{}."
ATTENTION = LAYER + "self_attn."

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
}
ATTENDING = {"head_dim": HEAD_DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS}


@dataclass(frozen=True)
class Family:
    """One family: `overrides` shrink the zoo's file to the model that `build` makes."""

    zoo: str
    """Name of the file; or the text of a space where the zoo has none of this family."""
    overrides: dict[str, Any]
    build: Callable[[], Any]
    table: list[Row]
    tolerance: float = 1e-5
    """Of logits of the order of 1, in float32."""
    constants: tuple[str, ...] = ()
    """Ends of the names of what theirs keep with their weights and is none."""


def shrink(groups: dict[str, dict[str, Any]], **whole: Any) -> dict[str, Any]:
    """Write overrides: of the architecture, and of groups of its blocks."""
    small = {"vocab_size": VOCABULARY, "d_model": WIDTH} | whole
    for group, fields in groups.items():
        small |= {f"blocks.{group}.{name}": value for name, value in fields.items()}
    return {f"architecture.{name}": value for name, value in small.items()}


def parts(mixer: dict[str, Any], ffn: dict[str, Any], **group: Any) -> dict[str, Any]:
    """Write overrides of one group of blocks."""
    fields = {f"mixer.{name}": value for name, value in mixer.items()}
    return fields | {f"ffn.{name}": value for name, value in ffn.items()} | group


WHOLE: list[Row] = [
    ("embedding", ("model.embed_tokens.weight",), same),
    ("norm.weight", ("model.norm.weight",), same),
    ("head.weight", ("lm_head.weight",), same),
    ("blocks.{}.norm1.weight", (LAYER + "input_layernorm.weight",), same),
    ("blocks.{}.norm2.weight", (LAYER + "post_attention_layernorm.weight",), same),
    ("blocks.{}.mixer.out.weight", (ATTENTION + "o_proj.weight",), same),
]


def qkv(suffix: str = "weight") -> Row:
    names = tuple(f"{ATTENTION}{x}_proj.{suffix}" for x in "qkv")
    return (f"blocks.{{}}.mixer.qkv.{suffix}", names, stacked)


QK_NORMS: list[Row] = [
    (f"blocks.{{}}.mixer.norm.{x}.weight", (f"{ATTENTION}{x}_norm.weight",), same) for x in "qk"
]


def dense(ours: str, theirs: str) -> list[Row]:
    """Rows of a gated network, with its gate and its value in two matrices."""
    up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return [
        (f"blocks.{{}}.{ours}.up.weight", up, stacked),
        (f"blocks.{{}}.{ours}.down.weight", (f"{theirs}down_proj.weight",), same),
    ]


def experts(router: str = "mlp.gate", place: str = "mlp.experts") -> list[Row]:
    """Rows of the experts, with gate and value in one stack of matrices."""
    bias = f"{LAYER}{router}.e_score_correction_bias"
    return [
        ("blocks.{}.ffn.router.logits.weight", (f"{LAYER}{router}.weight",), same),
        ("blocks.{}.ffn.balance.bias", (bias,), same),
        ("blocks.{}.ffn.experts.up", (f"{LAYER}{place}.gate_up_proj",), transposed),
        ("blocks.{}.ffn.experts.down", (f"{LAYER}{place}.down_proj",), transposed),
    ]


MIXTRAL = Family(
    "mixtral_8x7b",
    shrink({"0": parts(ATTENDING, {"d_expert": 24}, repeat=2)}),
    lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, num_hidden_layers=2, intermediate_size=24)
    ),
    [*WHOLE, qkv(), *experts()],
)

PHI_MOE = Family(
    "phi_3_5_moe",
    shrink({"0": parts(ATTENDING | {"head_dim": 8}, {"d_expert": 24, "n_experts": 8}, repeat=2)}),
    lambda: hf.PhimoeForCausalLM(
        hf.PhimoeConfig(
            **SIZES | {"head_dim": 8},
            num_hidden_layers=2,
            intermediate_size=24,
            num_local_experts=8,
            attention_bias=True,
            lm_head_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    [
        *WHOLE,
        ("norm.bias", ("model.norm.bias",), same),
        ("head.bias", ("lm_head.bias",), same),
        ("blocks.{}.norm1.bias", (LAYER + "input_layernorm.bias",), same),
        ("blocks.{}.norm2.bias", (LAYER + "post_attention_layernorm.bias",), same),
        ("blocks.{}.mixer.out.bias", (ATTENTION + "o_proj.bias",), same),
        *(qkv(), qkv("bias")),
        *experts("mlp.router"),
    ],
)

QWEN3_MOE = Family(
    "qwen3_30b_a3b",
    shrink({"0": parts(ATTENDING, {"d_expert": 24, "n_experts": 16}, repeat=2)}),
    lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SIZES,
            num_hidden_layers=2,
            moe_intermediate_size=24,
            num_experts=16,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ),
    [*WHOLE, qkv(), *QK_NORMS, *experts()],
)

OLMOE = Family(
    "olmoe_1b_7b",
    shrink(
        {"0": parts({"head_dim": 8, "n_heads": 4}, {"d_expert": 24, "n_experts": 16}, repeat=2)}
    ),
    lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_hidden_layers=2,
            intermediate_size=24,
            num_experts=16,
        )
    ),
    [*WHOLE, qkv(), *QK_NORMS, *experts()],
)

RANKS = {"n_heads": 4, "q_rank": 24, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "v_dim": 8}
LATENT: list[Row] = [
    ("blocks.{}.mixer.query.down.weight", (ATTENTION + "q_a_proj.weight",), same),
    ("blocks.{}.mixer.query.norm.weight", (ATTENTION + "q_a_layernorm.weight",), same),
    ("blocks.{}.mixer.query.up.weight", (ATTENTION + "q_b_proj.weight",), turned(4, 24, 8)),
    (
        "blocks.{}.mixer.keys.down.weight",
        (ATTENTION + "kv_a_proj_with_mqa.weight",),
        turned(1, 24, 8),
    ),
    ("blocks.{}.mixer.keys.norm.weight", (ATTENTION + "kv_a_layernorm.weight",), same),
    ("blocks.{}.mixer.keys.up.weight", (ATTENTION + "kv_b_proj.weight",), same),
]
LATENT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 32,
    "first_k_dense_replace": 1,
}


STRETCHED = 8
"""Tokens of the context before positions were stretched: the tests go on to 17."""


def yarn(factor: float, theta: float, mscale: float | None = None, **more: Any) -> dict[str, Any]:
    """Parameters of stretched positions for transformers; mscale as DeepSeek has it."""
    scales = {} if mscale is None else {"mscale": mscale, "mscale_all_dim": mscale}
    tokens = {"original_max_position_embeddings": STRETCHED}
    return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **tokens, **scales, **more}


def latent_shrink(top_k: int, factor: float, mscale: float) -> dict[str, Any]:
    stretched = RANKS | {
        "rope.scaling.original_max_position_embeddings": STRETCHED,
        "scale": (0.1 * mscale * math.log(factor) + 1) ** 2 / math.sqrt(16 + 8),
    }
    first = parts(stretched, {"d_ff": 40}, repeat=1)
    rest = {"d_expert": 24, "n_experts": 32, "router.top_k": top_k}
    return shrink({"0": first, "1": parts(stretched, rest, repeat=2)})


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    latent_shrink(8, 40, 1.0),
    lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**LATENT_SIZES, rope_parameters=yarn(40.0, 10000.0, 1.0))
    ),
    [
        *WHOLE,
        *LATENT,
        *experts(),
        *dense("ffn", LAYER + "mlp."),
        *dense("ffn.shared", LAYER + "mlp.shared_experts."),
    ],
)

KIMI_K2 = Family(
    "kimi_k2",
    latent_shrink(8, 32, 1.0),
    lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **LATENT_SIZES,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.827,
            rope_parameters=yarn(32.0, 50000.0, 1.0, beta_fast=1.0),
        )
    ),
    DEEPSEEK_V3.table,
)

DEEPSEEK_V2 = Family(
    "deepseek_v2",
    latent_shrink(6, 40, 0.707),
    lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(
            **LATENT_SIZES,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
            rope_parameters=yarn(40.0, 10000.0, 0.707),
        )
    ),
    DEEPSEEK_V3.table,
)

LITE_QUERY: Row = ("blocks.{}.mixer.query.weight", (ATTENTION + "q_proj.weight",), turned(4, 24, 8))
LITE = {name: value for name, value in latent_shrink(6, 40, 0.707).items() if "q_rank" not in name}
DEEPSEEK_V2_LITE = Family(
    "deepseek_v2_lite",
    LITE,
    lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(
            **(LATENT_SIZES | {"q_lora_rank": None}),
            num_experts_per_tok=6,
            topk_method="greedy",
            rope_parameters=yarn(40.0, 10000.0, 0.707),
        )
    ),
    [*DEEPSEEK_V3.table, LITE_QUERY],
)

SHORT = {"rope.scaling.original_max_position_embeddings": STRETCHED}
GPT_OSS = Family(
    "gpt_oss_20b",
    shrink(
        {
            "0.blocks.0": parts(
                ATTENDING | SHORT | {"window": 5}, {"d_expert": 24, "n_experts": 8}
            ),
            "0.blocks.1": parts(ATTENDING | SHORT, {"d_expert": 24, "n_experts": 8}),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SIZES,
            num_hidden_layers=2,
            intermediate_size=24,
            num_local_experts=8,
            sliding_window=5,
            rope_parameters=yarn(32.0, 150000.0, truncate=False),
        )
    ),
    [
        *WHOLE,
        qkv(),
        qkv("bias"),
        ("blocks.{}.mixer.attend.sinks", (ATTENTION + "sinks",), same),
        ("blocks.{}.mixer.out.bias", (ATTENTION + "o_proj.bias",), same),
        ("blocks.{}.ffn.router.logits.weight", (LAYER + "mlp.router.weight",), same),
        ("blocks.{}.ffn.router.logits.bias", (LAYER + "mlp.router.bias",), same),
        ("blocks.{}.ffn.experts.up", (LAYER + "mlp.experts.gate_up_proj",), halves),
        (
            "blocks.{}.ffn.experts.up_bias.weight",
            (LAYER + "mlp.experts.gate_up_proj_bias",),
            halves,
        ),
        ("blocks.{}.ffn.experts.down", (LAYER + "mlp.experts.down_proj",), same),
        (
            "blocks.{}.ffn.experts.down_bias.weight",
            (LAYER + "mlp.experts.down_proj_bias",),
            same,
        ),
    ],
)

GLM_4_5 = Family(
    "glm_4_5",
    shrink(
        {
            "0": parts(ATTENDING, {"d_ff": 40}, repeat=1),
            "1": parts(ATTENDING, {"d_expert": 24, "n_experts": 16}, repeat=2),
        }
    ),
    lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **SIZES,
            num_hidden_layers=3,
            intermediate_size=40,
            moe_intermediate_size=24,
            n_routed_experts=16,
            routed_scaling_factor=2.5,
            use_qk_norm=True,
            attention_bias=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    [*DEEPSEEK_V3.table, qkv(), qkv("bias"), *QK_NORMS],
)

GRANITE = Family(
    "granite_3_0_1b_a400m",
    shrink(
        {
            "0": parts(
                {"head_dim": 8, "n_heads": 4, "n_kv_heads": 2},
                {"d_expert": 24, "n_experts": 16},
                repeat=2,
            )
        }
    ),
    lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=24,
            num_local_experts=16,
            num_experts_per_tok=8,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.015625,
            logits_scaling=6.0,
            tie_word_embeddings=True,
        )
    ),
    [*WHOLE, qkv(), *experts("block_sparse_moe.router", "block_sparse_moe.experts")],
)


def turned_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turn = turned(HEADS, HEAD_DIM, HEAD_DIM), turned(KV_HEADS, HEAD_DIM, HEAD_DIM)
    return stacked(turn[0](q), turn[1](k), v)


LLAMA_FFN = {"d_expert": 24, "n_experts": 8}
LLAMA_4 = Family(
    "llama_4_scout",
    shrink(
        {
            "0.blocks.0": parts(ATTENDING | SHORT | {"chunk": 9}, LLAMA_FFN),
            "0.blocks.1": parts(ATTENDING | {"floor_scale": 3}, LLAMA_FFN),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES,
            num_hidden_layers=4,
            intermediate_size=24,
            num_local_experts=8,
            attention_chunk_size=9,
            floor_scale=3,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "original_max_position_embeddings": STRETCHED,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
            },
        )
    ),
    [
        *WHOLE,
        ("blocks.{}.mixer.qkv.weight", qkv()[1], turned_qkv),
        ("blocks.{}.ffn.router.logits.weight", (LAYER + "feed_forward.router.weight",), same),
        ("blocks.{}.ffn.experts.up", (LAYER + "feed_forward.experts.gate_up_proj",), same),
        ("blocks.{}.ffn.experts.down", (LAYER + "feed_forward.experts.down_proj",), same),
        *dense("ffn.shared", LAYER + "feed_forward.shared_expert."),
    ],
)

MAVERICK_DENSE = parts(ATTENDING | {"chunk": 9}, {"d_ff": 40})
MAVERICK = Family(
    "llama_4_maverick",
    shrink(
        {
            "0.blocks.0": MAVERICK_DENSE,
            "0.blocks.1": parts(ATTENDING | {"chunk": 9}, LLAMA_FFN),
            "0.blocks.2": MAVERICK_DENSE,
            "0.blocks.3": parts(ATTENDING | {"floor_scale": 3}, LLAMA_FFN),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES,
            num_hidden_layers=4,
            intermediate_size=24,
            intermediate_size_mlp=40,
            interleave_moe_layer_step=2,
            num_local_experts=8,
            use_qk_norm=False,
            attention_chunk_size=9,
            floor_scale=3,
        )
    ),
    [*LLAMA_4.table, *dense("ffn", LAYER + "feed_forward.")],
)

MAMBA: list[Row] = [
    (f"blocks.{{}}.mixer.{ours}", (f"{LAYER}mamba.{theirs}",), same)
    for ours, theirs in {
        "project.weight": "in_proj.weight",
        "convolution.bias": "conv1d.bias",
        "choose.project.weight": "x_proj.weight",
        "choose.dt.weight": "dt_proj.weight",
        "choose.dt_bias": "dt_proj.bias",
        "choose.norms.0.weight": "dt_layernorm.weight",
        "choose.norms.1.weight": "b_layernorm.weight",
        "choose.norms.2.weight": "c_layernorm.weight",
        "out.weight": "out_proj.weight",
        "log_rate": "A_log",
        "skip": "D",
    }.items()
]
MAMBA_SIZES = {"d_inner": 64, "d_state": 6, "dt_rank": 3}
JAMBA_DENSE, JAMBA_MOE = {"d_ff": 24}, {"d_expert": 24, "n_experts": 8}
JAMBA = Family(
    "jamba_v0_1",
    shrink(
        {
            "0.blocks.0.blocks.0": parts(MAMBA_SIZES, JAMBA_DENSE),
            "0.blocks.0.blocks.1": parts(MAMBA_SIZES, JAMBA_MOE),
            "0.blocks.1": parts(ATTENDING, JAMBA_DENSE),
            "0.blocks.2": parts(MAMBA_SIZES, JAMBA_MOE),
            "0.blocks.3": parts(MAMBA_SIZES, JAMBA_DENSE),
            "0.blocks.4": parts(MAMBA_SIZES, JAMBA_MOE),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **SIZES,
            num_hidden_layers=8,
            intermediate_size=24,
            num_experts=8,
            mamba_d_state=6,
            mamba_dt_rank=3,
            use_mamba_kernels=False,
        )
    ),
    [
        *WHOLE,
        *MAMBA,
        ("norm.weight", ("model.final_layernorm.weight",), same),
        ("blocks.{}.norm2.weight", (LAYER + "pre_ff_layernorm.weight",), same),
        ("blocks.{}.mixer.convolution.weight", (LAYER + "mamba.conv1d.weight",), squeezed),
        qkv(),
        *dense("ffn", LAYER + "feed_forward."),
        *experts("feed_forward.router", "feed_forward.experts"),
    ],
    1e-4,  # transformers' own logits in float32 are 5e-5 away from those in float64
)

NEMOTRON_GROUPS = ("MEMEM*", "EMEMEM*", "EMEMEMEM*", "EMEMEMEME")
NEMOTRON_PLACES = {
    **{"0.blocks.0": "M", "0.blocks.1": "E", "1": "M", "2": "*"},
    **{"3.blocks.0.blocks.0": "E", "3.blocks.0.blocks.1": "M", "3.blocks.1": "*"},
    **{"4.blocks.0": "E", "4.blocks.1": "M", "5": "*"},
    **{"6.blocks.0": "E", "6.blocks.1": "M", "7": "E"},
}
"""Path of a group of the file, and the part of its layers."""
NEMOTRON_KINDS = {"M": "mamba", "E": "moe", "*": "attention"}
NEMOTRON_SIZES = {
    "M": parts({"n_heads": 4, "head_dim": 8, "d_state": 6, "n_state_groups": 2}, {}),
    "E": parts({}, {"d_expert": 24, "n_experts": 16, "d_shared": 40}),
    "*": parts(ATTENDING, {}),
}
MIXER = LAYER + "mixer."
NEMOTRON = Family(
    "nemotron_3_nano",
    shrink(
        {
            **{place: NEMOTRON_SIZES[kind] for place, kind in NEMOTRON_PLACES.items()},
            "3": {"repeat": 1},
        }
    ),
    lambda: hf.NemotronHForCausalLM(
        hf.NemotronHConfig(
            **SIZES,
            layers_block_type=[NEMOTRON_KINDS[kind] for kind in "".join(NEMOTRON_GROUPS)],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=6,
            n_groups=2,
            chunk_size=16,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=40,
            n_routed_experts=16,
            num_experts_per_tok=6,
            routed_scaling_factor=2.5,
        )
    ),
    [
        ("embedding", ("model.embeddings.weight",), same),
        ("norm.weight", ("model.norm_f.weight",), same),
        ("head.weight", ("lm_head.weight",), same),
        *(
            (f"blocks.{i}.{'norm2' if kind == 'E' else 'norm1'}.weight", (name,), same)
            for i, kind in enumerate("".join(NEMOTRON_GROUPS))
            for name in (f"model.layers.{i}.norm.weight",)
        ),
        ("blocks.{}.mixer.qkv.weight", tuple(f"{MIXER}{x}_proj.weight" for x in "qkv"), stacked),
        ("blocks.{}.mixer.out.weight", (MIXER + "o_proj.weight",), same),
        ("blocks.{}.mixer.project.weight", (MIXER + "in_proj.weight",), same),
        ("blocks.{}.mixer.convolution.weight", (MIXER + "conv1d.weight",), squeezed),
        ("blocks.{}.mixer.convolution.bias", (MIXER + "conv1d.bias",), same),
        ("blocks.{}.mixer.norm.weight", (MIXER + "norm.weight",), same),
        ("blocks.{}.mixer.out.weight", (MIXER + "out_proj.weight",), same),
        ("blocks.{}.mixer.log_rate", (MIXER + "A_log",), same),
        ("blocks.{}.mixer.dt_bias", (MIXER + "dt_bias",), same),
        ("blocks.{}.mixer.skip", (MIXER + "D",), same),
        ("blocks.{}.ffn.router.logits.weight", (MIXER + "gate.weight",), same),
        ("blocks.{}.ffn.balance.bias", (MIXER + "gate.e_score_correction_bias",), same),
        ("blocks.{}.ffn.experts.up", (MIXER + "experts.up_proj",), transposed),
        ("blocks.{}.ffn.experts.down", (MIXER + "experts.down_proj",), transposed),
        ("blocks.{}.ffn.shared.up.weight", (MIXER + "shared_experts.up_proj.weight",), same),
        ("blocks.{}.ffn.shared.down.weight", (MIXER + "shared_experts.down_proj.weight",), same),
    ],
    3e-5,  # a state that sums over tokens in another order
)

FAMILIES = {
    family.zoo: family
    for family in (
        MIXTRAL,
        PHI_MOE,
        QWEN3_MOE,
        OLMOE,
        DEEPSEEK_V3,
        KIMI_K2,
        DEEPSEEK_V2,
        DEEPSEEK_V2_LITE,
        GPT_OSS,
        GLM_4_5,
        GRANITE,
        LLAMA_4,
        MAVERICK,
        JAMBA,
        NEMOTRON,
    )
}
