"""Families of 2026: gates, temperatures, norms by part and selection biases of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import (
    ATTENTION,
    DEEPSEEK_V3,
    LATENT_SIZES,
    LAYER,
    QK_NORMS,
    SIZES,
    VOCABULARY,
    WHOLE,
    WIDTH,
    Family,
    dense,
    experts,
    qkv,
    yarn,
)
from torch import Tensor
from variants import SHARED
from weights import Row, same, turned

HEADER = """
architecture:
  vocab_size: 256
  d_model: 32
  tie_embeddings: false
"""
FOOTER = "objectives: [active_params]\n"
HEADS = "kind: attention, head_dim: 16, n_heads: 4, n_kv_heads: 2"
NORMED = f"{HEADS}, qk_norm: head"
DENSE = "ffn: {kind: dense, d_ff: 40}"
LATENT_HEADS = (
    "kind: latent_attention, n_heads: 4, q_rank: 24, kv_rank: 16, nope_dim: 16, rope_dim: 8,"
    " v_dim: 8"
)
FULL, SLIDING = "full_attention", "sliding_attention"


def space(*lines: str) -> str:
    """The text of a space file: fields of the architecture, and its blocks."""
    fields = [line for line in lines if not line.startswith("-")]
    blocks = [line for line in lines if line.startswith("-")]
    return HEADER + "".join(f"  {x}\n" for x in (*fields, "blocks:", *blocks)) + FOOTER


def block(mixer: str, ffn: str, more: str = "") -> str:
    return f"- {{mixer: {{{mixer}}}, {ffn}{more}}}"


def moe(router: str, more: str = "", n_experts: int = 16) -> str:
    fields = f"kind: moe, n_experts: {n_experts}, d_expert: 24{more}, router: {{{router}}}"
    return f"ffn: {{{fields}}}"


def shared_expert(name: str = "shared_experts") -> list[Row]:
    return dense("ffn.shared", f"{LAYER}mlp.{name}.")


BIASED = "score: sigmoid, top_k: 8, normalize: true, balance: bias"
ONE_SHARED = ", n_shared_experts: 1"
WIDE_SHARED = ", n_shared_experts: 1, d_shared: 40"
LOCAL = "window: 5"
STILL = "rope: {partial_rotary_factor: 0}"
EXPERT_SIZES: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 16}
SHARED_SIZES = EXPERT_SIZES | {"shared_expert_intermediate_size": 40}
TYPES = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 5}
DEFAULT_TURNS = {"rope_type": "default", "rope_theta": 10000.0}


def turns(full: float, local: float) -> dict[str, Any]:
    return {
        FULL: {"rope_type": "default", "rope_theta": full},
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }


SANDWICH: Callable[..., list[Row]] = lambda names: [  # noqa: E731
    (f"blocks.{{}}.{ours}.weight", (f"{LAYER}{theirs}.weight",), same)
    for ours, theirs in zip(
        ("norm1.before", "norm1.after", "norm2.before", "norm2.after"), names, strict=True
    )
]

EXAONE = Family(
    space(
        "norm_eps: 1e-5",
        block(f"{NORMED}, inner_eps: 1e-5, {LOCAL}", DENSE),
        block(
            f"{NORMED}, inner_eps: 1e-5, {STILL}",
            moe(
                f"{BIASED}, scale: 2.5, selection: {{kind: top_k, n_groups: 4, top_groups: 2,"
                " group_score: top2_sum}",
                ONE_SHARED,
            ),
        ),
    ),
    {},
    lambda: hf.ExaoneMoeForCausalLM(
        hf.ExaoneMoeConfig(
            **SIZES,
            **EXPERT_SIZES,
            **TYPES,
            intermediate_size=40,
            mlp_layer_types=["dense", "sparse"],
            n_group=4,
            topk_group=2,
        )
    ),
    [*WHOLE, qkv(), *QK_NORMS, *dense("ffn", LAYER + "mlp."), *experts(), *SHARED],
)

HUNYUAN_3 = Family(
    space(
        "norm_eps: 1e-5",
        block(f"{NORMED}, inner_eps: 1e-5, rope: {{theta: 11158840}}", DENSE),
        block(
            f"{NORMED}, inner_eps: 1e-5, rope: {{theta: 11158840}}",
            moe(f"{BIASED}, scale: 2.826", ONE_SHARED),
        ),
    ),
    {},
    lambda: hf.HYV3ForCausalLM(
        hf.HYV3Config(**SIZES, **EXPERT_SIZES, num_hidden_layers=2, intermediate_size=40)
    ),
    [
        *WHOLE,
        qkv(),
        *QK_NORMS,
        *dense("ffn", LAYER + "mlp."),
        *experts(),
        ("blocks.{}.ffn.balance.bias", (LAYER + "mlp.e_score_correction_bias",), same),
        *SHARED,
    ],
)

MELLUM = Family(
    space(
        block(f"{NORMED}, {LOCAL}, rope: {{theta: 1000}}", moe("top_k: 8, normalize: true")),
        block(f"{NORMED}, rope: {{theta: 500000}}", DENSE),
    ),
    {},
    lambda: hf.MellumForCausalLM(
        hf.MellumConfig(
            **SIZES,
            **TYPES,
            moe_intermediate_size=24,
            num_local_experts=16,
            intermediate_size=40,
            mlp_layer_types=["sparse", "dense"],
            rope_parameters=turns(500000.0, 1000.0),
        )
    ),
    [*WHOLE, qkv(), *QK_NORMS, *dense("ffn", LAYER + "mlp."), *experts()],
)

FLINT = Family(
    space(
        block(
            f"{NORMED}, sinks: true, {LOCAL}",
            moe("score: sigmoid, top_k: 6, normalize: true, balance: none", WIDE_SHARED),
        ),
        block(f"{NORMED}, sinks: true, {STILL}", DENSE),
    ),
    {},
    lambda: hf.FlintForCausalLM(
        hf.FlintConfig(**SIZES, **SHARED_SIZES, **TYPES, intermediate_size=40, mlp_only_layers=[1])
    ),
    [
        *WHOLE,
        qkv(),
        *QK_NORMS,
        ("blocks.{}.mixer.attend.sinks", (ATTENTION + "sinks",), same),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
        *shared_expert("shared_expert"),
    ],
)


def laguna(gating: str) -> Family:
    gated = f"output_gate: {gating.removeprefix('per-')}, gate_activation: softplus"
    mixer = f"kind: attention, head_dim: 16, n_kv_heads: 2, qk_norm: head, {gated}"
    return Family(
        space(
            block(f"{mixer}, n_heads: 2, rope: {{theta: 1000}}, {LOCAL}", DENSE),
            block(
                f"{mixer}, n_heads: 4, rope: {{theta: 500000, partial_rotary_factor: 0.5}}",
                moe(f"{BIASED}, scale: 2.5, logits: {{kind: linear, cap: 3.0}}", WIDE_SHARED),
            ),
        ),
        {},
        lambda: hf.LagunaForCausalLM(
            hf.LagunaConfig(
                **SIZES,
                **SHARED_SIZES,
                **TYPES,
                gating=gating,
                intermediate_size=40,
                num_attention_heads_per_layer=[2, 4],
                moe_routed_scaling_factor=2.5,
                moe_router_logit_softcapping=3.0,
                rope_parameters={
                    FULL: DEFAULT_TURNS | {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
                    SLIDING: DEFAULT_TURNS | {"rope_theta": 1e3},
                },
            )
        ),
        [
            *WHOLE,
            qkv(),
            *QK_NORMS,
            ("blocks.{}.mixer.gate.weight", (ATTENTION + "g_proj.weight",), same),
            *dense("ffn", LAYER + "mlp."),
            *experts(),
            *SHARED,
        ],
    )


KOLIBRI = Family(
    space(
        "norm_position: sandwich",
        block(
            f"{NORMED}, {LOCAL}",
            moe(f"{BIASED}, bias_on: logits".replace("top_k: 8", "top_k: 6"), WIDE_SHARED),
        ),
        block(
            f"{NORMED}, {STILL}",
            moe(f"{BIASED}, bias_on: logits".replace("top_k: 8", "top_k: 6"), WIDE_SHARED),
        ),
    ),
    {},
    lambda: hf.Kolibri1ForCausalLM(
        hf.Kolibri1Config(
            **SIZES,
            **TYPES,
            moe_intermediate_size=24,
            num_local_experts=16,
            shared_expert_intermediate_size=40,
            norm_topk_prob=True,
        )
    ),
    [
        *WHOLE[:3],
        WHOLE[-1],
        *SANDWICH(
            (
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            )
        ),
        qkv(),
        *QK_NORMS,
        *experts(),
        *SHARED,
    ],
)

LATENT_TABLE = DEEPSEEK_V3.table
A_X_K1 = Family(
    space(
        block(LATENT_HEADS, DENSE),
        block(
            LATENT_HEADS,
            moe(
                "preset: deepseek_v3, selection: {kind: top_k, n_groups: 8, top_groups: 4,"
                " group_score: top2_sum}",
                ONE_SHARED,
                32,
            ),
            ", ffn_norm: sandwich, repeat: 2",
        ),
    ),
    {},
    lambda: hf.AXK1ForCausalLM(
        hf.AXK1Config(**{k: v for k, v in LATENT_SIZES.items() if k != "first_k_dense_replace"})
    ),
    [
        *(row for row in LATENT_TABLE if row[0] != "blocks.{}.norm2.weight"),
        *(
            (
                f"blocks.{i}.norm2.{'before.' if i else ''}weight",
                (f"{LAYER.format(i)}post_attention_layernorm.weight",),
                same,
            )
            for i in range(3)
        ),
        ("blocks.{}.norm2.after.weight", (LAYER + "mlp.post_mlp_layernorm.weight",), same),
    ],
)

MISTRAL_4 = Family(
    space(
        block(
            f"{LATENT_HEADS}, floor_scale: 8, attn_scale: 0.7, floor_offset: 0, rope: {{scaling:"
            " {kind: yarn, factor: 4, original_max_position_embeddings: 8, attention_factor: 1}},"
            f" scale: {(1 + 0.1 * math.log(4)) ** 2 / 24**0.5}",
            moe(
                "top_k: 4, normalize: true, scale: 1.5, balance: none, selection: {kind: top_k,"
                " n_groups: 4, top_groups: 2, group_score: top2_sum}",
                ONE_SHARED,
                32,
            ),
            ", repeat: 3",
        ),
    ),
    {},
    lambda: hf.Mistral4ForCausalLM(
        hf.Mistral4Config(
            **{k: v for k, v in LATENT_SIZES.items() if k != "first_k_dense_replace"},
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            rope_parameters=yarn(4.0, 10000.0, 1.0)
            | {"llama_4_scaling_beta": 0.7, "partial_rotary_factor": 1 / 3},
        )
    ),
    LATENT_TABLE,
)

# With many heads no two scores are 0, so no order among equal scores decides.
INDEXER = "indexer: {n_heads: 16, head_dim: 16, top_k: 5}"
INDEX_SIZES = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 5}


def turned_first(n_heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of heads of 16 whose first 8 elements turn as pairs of neighbours, as pairs of halves."""

    def form(x: Tensor) -> Tensor:
        heads = x.unflatten(0, (n_heads, 16))
        parts = heads[:, 0:8:2], heads[:, 1:8:2], heads[:, 8:]
        return torch.cat(parts, dim=1).flatten(0, 1)

    return form


def index_rows(*, neighbours: bool) -> list[Row]:
    one, heads = (turned_first(1), turned_first(16)) if neighbours else (same, same)
    ours, theirs = "blocks.{}.mixer.indexer.", ATTENTION + "indexer."
    return [
        (ours + "query.weight", (theirs + "wq_b.weight",), heads),
        (ours + "key.weight", (theirs + "wk.weight",), one),
        (ours + "norm.weight", (theirs + "k_norm.weight",), one),
        (ours + "norm.bias", (theirs + "k_norm.bias",), one),
        (ours + "weigh.weight", (theirs + "weights_proj.weight",), same),
    ]


def indexed(n_groups: int) -> str:
    grouped = (
        f", selection: {{kind: top_k, n_groups: {n_groups}, top_groups: {n_groups // 2},"
        " group_score: top2_sum}"
        if n_groups > 1
        else ""
    )
    return space(
        block(f"{LATENT_HEADS}, {INDEXER}", DENSE),
        block(
            f"{LATENT_HEADS}, {INDEXER}",
            moe(f"preset: deepseek_v3{grouped}", ONE_SHARED, 32),
            ", repeat: 2",
        ),
    )


DEEPSEEK_V32 = Family(
    indexed(8),
    {},
    lambda: hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**LATENT_SIZES, **INDEX_SIZES)),
    [*LATENT_TABLE, *index_rows(neighbours=False)],
)
GLM_5 = Family(
    indexed(1).replace("d_model: 32", "d_model: 32\n  norm_eps: 1e-5"),
    {},
    lambda: hf.GlmMoeDsaForCausalLM(hf.GlmMoeDsaConfig(**LATENT_SIZES, **INDEX_SIZES)),
    [*LATENT_TABLE, *index_rows(neighbours=True)],
)

DOTS = (
    "kind: latent_attention, q_rank: 24, kv_rank: 16, inner_eps: 1e-5, rank_scale: true,"
    " output_gate: head, rope_norm: true, nope_dim: 16, rope_dim: 8"
)
DOTS_EXPERTS = moe("preset: deepseek_v3, scale: 1", ", n_shared_experts: 1, d_shared: 40", 32)
DOTS_3 = Family(
    space(
        "norm_eps: 1e-5",
        block(f"{DOTS}, n_heads: 4, v_dim: 8, rope: {{theta: 8e7}}, {INDEXER}", DENSE),
        block(f"{DOTS}, n_heads: 2, v_dim: 16, rope: {{theta: 5e4}}, {LOCAL}", DOTS_EXPERTS),
    ),
    {},
    lambda: hf.Dots3NoteForCausalLM(
        hf.Dots3NoteTextConfig(
            **{k: v for k, v in LATENT_SIZES.items() if k != "num_hidden_layers"},
            **INDEX_SIZES,
            num_hidden_layers=2,
            layer_types=["indexed_attention", SLIDING],
            sliding_window=5,
            head_dim=24,
            shared_experts_intermediate_size=40,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=2,
            swa_q_lora_rank=24,
            swa_kv_lora_rank=16,
            swa_head_dim=24,
            swa_qk_nope_head_dim=16,
            swa_v_head_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    [
        *(row for row in LATENT_TABLE if "query.up" not in row[0]),
        *(
            (
                f"blocks.{i}.mixer.query.up.weight",
                (f"{ATTENTION.format(i)}q_b_proj.weight",),
                turned(n_heads, 24, 8),
            )
            for i, n_heads in enumerate((4, 2))
        ),
        ("blocks.{}.mixer.gate.weight", (ATTENTION + "g_proj.weight",), same),
        (
            "blocks.{}.mixer.rope_norm.weight",
            (ATTENTION + "k_rope_only_layernorm.weight",),
            turned(1, 8, 8),
        ),
        *index_rows(neighbours=True),
    ],
)

BEAM = Family(
    space(
        "norm_position: sandwich",
        "depth_scale: true",
        "logit_softcap: 30",
        block(f"{NORMED}, {LOCAL}, output_gate: element, gate_bias: true", DENSE),
        block(
            f"{NORMED}, {STILL}, output_gate: element, gate_bias: true, floor_scale: 2048,"
            " attn_scale: 0.1, scale_growth: power",
            moe(
                f"{BIASED}, scale: 2.5, selection: {{kind: top_k, n_groups: 4, top_groups: 2,"
                " group_score: top2_sum}",
            ),
        ),
    ),
    {},
    lambda: hf.BeamForCausalLM(
        hf.BeamConfig(
            **SIZES,
            **EXPERT_SIZES,
            **TYPES,
            intermediate_size=40,
            mlp_layer_types=["dense", "sparse"],
            n_group=4,
            topk_group=2,
        )
    ),
    [
        *WHOLE[:3],
        WHOLE[-1],
        *SANDWICH(
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )
        ),
        qkv(),
        *QK_NORMS,
        ("blocks.{}.mixer.gate.weight", (ATTENTION + "gate_proj.weight",), same),
        ("blocks.{}.mixer.gate.head_bias", (ATTENTION + "gate_bias",), same),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
    ],
)

GRANITE_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 6.0,
}
GRANITE_FACTORS = (
    "embedding_multiplier: 12",
    "residual_multiplier: 0.22",
    f"logit_multiplier: {1 / 6}",
)
GRANITE_HEADS = "kind: attention, head_dim: 8, n_heads: 4, n_kv_heads: 2, scale: 0.3"
GRANITE_EXPERTS = moe("top_k: 4, normalize: true", WIDE_SHARED)
GRANITE_ROWS: list[Row] = [
    *WHOLE,
    qkv(),
    *experts("block_sparse_moe.router", "block_sparse_moe.experts"),
    ("blocks.{}.ffn.shared.up.weight", (LAYER + "shared_mlp.input_linear.weight",), same),
    ("blocks.{}.ffn.shared.down.weight", (LAYER + "shared_mlp.output_linear.weight",), same),
]
GRANITE_SHARED = Family(
    space(*GRANITE_FACTORS, block(GRANITE_HEADS, GRANITE_EXPERTS, ", repeat: 2")),
    {},
    lambda: hf.GraniteMoeSharedForCausalLM(hf.GraniteMoeSharedConfig(**GRANITE_SIZES)),
    GRANITE_ROWS,
)
GRANITE_WINDOWS = Family(
    space(
        *GRANITE_FACTORS,
        block(f"{GRANITE_HEADS}, sinks: true, {STILL}", GRANITE_EXPERTS),
        block(f"{GRANITE_HEADS}, sinks: true, {LOCAL}, rope: {{theta: 500}}", GRANITE_EXPERTS),
    ),
    {},
    lambda: hf.GraniteMoeSWAForCausalLM(
        hf.GraniteMoeSWAConfig(
            **GRANITE_SIZES,
            layer_types=[FULL, SLIDING],
            sliding_window=5,
            layer_rope_theta=[0, 500.0],
        )
    ),
    [*GRANITE_ROWS, ("blocks.{}.mixer.attend.sinks", (ATTENTION + "sinks",), same)],
)

RECENT = {
    "exaone_moe": EXAONE,
    "hy_v3": HUNYUAN_3,
    "mellum": MELLUM,
    "flint": FLINT,
    "laguna": laguna("per-head"),
    "laguna_by_element": laguna("per-element"),
    "kolibri1": KOLIBRI,
    "axk1": A_X_K1,
    "mistral4": MISTRAL_4,
    "beam": BEAM,
    "deepseek_v32": DEEPSEEK_V32,
    "glm_moe_dsa": GLM_5,
    "dots3_note": DOTS_3,
    "granitemoeshared": GRANITE_SHARED,
    "granitemoe_swa": GRANITE_WINDOWS,
}
