"""Families with factors of blocks, heads by kind of layer, and selected blocks of keys."""

from __future__ import annotations

from typing import Any

import transformers as hf
from families import (
    ATTENTION,
    LATENT_SIZES,
    LAYER,
    SIZES,
    VOCABULARY,
    WHOLE,
    WIDTH,
    Family,
    dense,
    qkv,
)
from recent import (
    DENSE,
    FULL,
    INDEX_SIZES,
    INDEXER,
    LATENT_HEADS,
    LATENT_TABLE,
    ONE_SHARED,
    SANDWICH,
    SLIDING,
    block,
    index_rows,
    moe,
    space,
)
from weights import Row, from_one, same, stacked, transposed

# --- Gemma 4 ------------------------------------------------------------------------------------

GEMMA_HEADS = "kind: attention, n_heads: 4, qk_norm: head, v_norm: true, scale: 1"
GEMMA_LOCAL = f"{GEMMA_HEADS}, head_dim: 16, n_kv_heads: 2, window: 5"
GEMMA_FULL = (
    f"{GEMMA_HEADS}, head_dim: 24, n_kv_heads: 1, k_eq_v: true,"
    " rope: {theta: 1000000, scaling: {kind: proportional, fraction: 0.25}}"
)
GEMMA_DENSE = "ffn: {kind: dense, d_ff: 40, activation: geglu_tanh}"
GEMMA_WIDE = "ffn: {kind: dense, d_ff: 80, activation: geglu_tanh}"
GEMMA_MOE = (
    ", block_scale: true, sum_norm: true, shortcut_input: stream, shortcut: {kind: moe,"
    " n_experts: 16, d_expert: 24, activation: geglu_tanh, router: {preset: gemma_4, top_k: 4,"
    f" logits: {{kind: linear, input: stream, input_norm: true, multiplier: {WIDTH**-0.5!r}}}}}}}"
)
GEMMA_WHOLE = (
    "norm_position: sandwich",
    f"embedding_multiplier: {WIDTH**0.5!r}",
    "logit_softcap: 30",
)


def tied(*lines: str) -> str:
    return space(*lines).replace("tie_embeddings: false", "tie_embeddings: true")


def gemma(n_shared: int, types: list[str], **more: Any) -> Any:
    return hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            global_head_dim=24,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_hidden_layers=len(types),
            layer_types=types,
            sliding_window=5,
            intermediate_size=40,
            hidden_size_per_layer_input=0,
            final_logit_softcapping=30.0,
            num_kv_shared_layers=n_shared,
            # Theirs drops rows of inputs by layer, which it has not, where keys are shared.
            output_hidden_states=True,
            **more,
        )
    )


def gemma_rows(types: list[str], n_own: int, norms: tuple[str, ...]) -> list[Row]:
    """Rows of layers by kind; the layers from `n_own` on have queries alone."""
    rows: list[Row] = [
        WHOLE[0],
        WHOLE[1],
        WHOLE[-1],
        *SANDWICH(norms),
        ("blocks.{}.scale", (LAYER + "layer_scalar",), same),
        *dense("ffn", LAYER + "mlp."),
    ]
    for i, kind in enumerate(types):
        place = ATTENTION.format(i)
        if i >= n_own:
            rows += [
                (f"blocks.{i}.mixer.queries.project.weight", (f"{place}q_proj.weight",), same),
                (f"blocks.{i}.mixer.queries.norm.weight", (f"{place}q_norm.weight",), same),
            ]
            continue
        names = tuple(f"{place}{x}_proj.weight" for x in ("qk" if kind == FULL else "qkv"))
        rows.append((f"blocks.{i}.mixer.qkv.qkv.weight", names, stacked))
        rows += [
            (f"blocks.{i}.mixer.norm.{x}.weight", (f"{place}{x}_norm.weight",), same) for x in "qk"
        ]
    return rows


NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
ROUTER = "blocks.{}.shortcut.ffn.router."
GEMMA_4 = Family(
    tied(
        *GEMMA_WHOLE,
        block(GEMMA_LOCAL, GEMMA_DENSE, GEMMA_MOE),
        block(GEMMA_FULL, GEMMA_DENSE, GEMMA_MOE),
    ),
    {},
    lambda: gemma(
        0,
        [SLIDING, FULL],
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=24,
    ),
    [
        *gemma_rows([SLIDING, FULL], 2, (*NORMS, "post_feedforward_layernorm_1")),
        ("blocks.{}.shortcut.before.weight", (LAYER + "pre_feedforward_layernorm_2.weight",), same),
        ("blocks.{}.shortcut.after.weight", (LAYER + "post_feedforward_layernorm_2.weight",), same),
        ("blocks.{}.sum_norm.weight", (LAYER + "post_feedforward_layernorm.weight",), same),
        (ROUTER + "enter.norm.weight", (LAYER + "router.scale",), same),
        (ROUTER + "logits.weight", (LAYER + "router.proj.weight",), same),
        (ROUTER + "weights.expert_scale", (LAYER + "router.per_expert_scale",), same),
        ("blocks.{}.shortcut.ffn.experts.up", (LAYER + "experts.gate_up_proj",), transposed),
        ("blocks.{}.shortcut.ffn.experts.down", (LAYER + "experts.down_proj",), transposed),
    ],
)
SHARING = [SLIDING, FULL, SLIDING, SLIDING, FULL]
GEMMA_4_DENSE = Family(
    tied(
        *GEMMA_WHOLE,
        block(GEMMA_LOCAL, GEMMA_DENSE, ", block_scale: true"),
        block(GEMMA_FULL, GEMMA_DENSE, ", block_scale: true"),
        block(GEMMA_LOCAL, GEMMA_DENSE, ", block_scale: true"),
        block(f"{GEMMA_LOCAL}, kv_source: 1", GEMMA_WIDE, ", block_scale: true"),
        block(f"{GEMMA_FULL}, kv_source: 2", GEMMA_WIDE, ", block_scale: true"),
    ),
    {},
    lambda: gemma(2, SHARING, use_double_wide_mlp=True),
    gemma_rows(SHARING, 3, (*NORMS, "post_feedforward_layernorm")),
)

# --- MiniMax-M3 ---------------------------------------------------------------------------------

OAI = "gate_limit: 3, gate_alpha: 1.5, up_shift: 1"
M3_HEADS = (
    "kind: attention, head_dim: 16, n_heads: 4, n_kv_heads: 2, qk_norm: head,"
    " rope: {theta: 5000000, partial_rotary_factor: 0.5}"
)


def distances(*rows: Row) -> list[Row]:
    """The rows of norms whose weight is written as its distance from 1."""
    return [(ours, theirs, from_one) for ours, theirs, _ in rows]


def minimax_m3(layer_types: list[str], **more: Any) -> Any:
    return hf.MiniMaxM3VLForCausalLM(
        hf.MiniMaxM3VLTextConfig(
            **SIZES,
            num_hidden_layers=2,
            layer_types=layer_types,
            mlp_layer_types=["dense", "sparse"],
            intermediate_size=24,
            dense_intermediate_size=40,
            shared_intermediate_size=40,
            num_local_experts=16,
            num_experts_per_tok=8,
            swiglu_limit=3.0,
            swiglu_alpha=1.5,
            bos_token_id=0,
            eos_token_id=1,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
            **more,
        )
    )


M3_ROWS: list[Row] = [
    WHOLE[0],
    WHOLE[2],
    WHOLE[-1],
    qkv(),
    *distances(
        WHOLE[1],
        WHOLE[3],
        WHOLE[4],
        *(
            (f"blocks.{{}}.mixer.norm.{x}.weight", (f"{ATTENTION}{x}_norm.weight",), same)
            for x in "qk"
        ),
    ),
    ("blocks.{}.ffn.up.weight", (LAYER + "mlp.gate_up_proj.weight",), same),
    ("blocks.{}.ffn.down.weight", (LAYER + "mlp.down_proj.weight",), same),
    ("blocks.{}.ffn.shared.up.weight", (LAYER + "mlp.shared_experts.gate_up_proj.weight",), same),
    ("blocks.{}.ffn.shared.down.weight", (LAYER + "mlp.shared_experts.down_proj.weight",), same),
    ("blocks.{}.ffn.router.logits.weight", (LAYER + "mlp.gate.weight",), same),
    ("blocks.{}.ffn.balance.bias", (LAYER + "mlp.gate.e_score_correction_bias",), same),
    ("blocks.{}.ffn.experts.up", (LAYER + "mlp.experts.gate_up_proj",), transposed),
    ("blocks.{}.ffn.experts.down", (LAYER + "mlp.experts.down_proj",), transposed),
]
M3_MOE = moe(
    "score: sigmoid, top_k: 8, normalize: true, balance: bias, scale: 2",
    f", {OAI}, n_shared_experts: 1, d_shared: 40",
)
M3_DENSE = f"ffn: {{kind: dense, d_ff: 40, {OAI}}}"
MINIMAX_M3 = Family(
    space(block(M3_HEADS, M3_DENSE), block(M3_HEADS, M3_MOE)),
    {},
    lambda: minimax_m3([FULL, FULL]),
    M3_ROWS,
)

# --- GLM-5 --------------------------------------------------------------------------------------

SHARED_INDEX = f"{LATENT_HEADS}, index_shared: true"
INDEXED_EXPERTS = moe("preset: deepseek_v3", ONE_SHARED, 32)
GLM_5_SHARED = Family(
    space(
        "norm_eps: 1e-5",
        block(f"{LATENT_HEADS}, {INDEXER}", DENSE),
        block(SHARED_INDEX, INDEXED_EXPERTS),
        block(f"{LATENT_HEADS}, {INDEXER}", INDEXED_EXPERTS),
        block(SHARED_INDEX, INDEXED_EXPERTS),
    ),
    {},
    lambda: hf.GlmMoeDsaForCausalLM(
        hf.GlmMoeDsaConfig(
            **LATENT_SIZES | {"num_hidden_layers": 4},
            **INDEX_SIZES,
            indexer_types=["full", "shared", "full", "shared"],
        )
    ),
    [*LATENT_TABLE, *index_rows(neighbours=True)],
)

M3_INDEXED = (
    f"{M3_HEADS}, block_indexer: {{head_dim: 16, block: 3, top_blocks: 3, local_blocks: 2}}"
)
M3_INDEX: list[Row] = [
    ("blocks.{}.mixer.indexer.query.weight", (ATTENTION + "indexer.q_proj.weight",), same),
    ("blocks.{}.mixer.indexer.key.weight", (ATTENTION + "indexer.k_proj.weight",), same),
    *distances(
        (
            "blocks.{}.mixer.indexer.query_norm.weight",
            (ATTENTION + "indexer.q_norm.weight",),
            same,
        ),
        ("blocks.{}.mixer.indexer.key_norm.weight", (ATTENTION + "indexer.k_norm.weight",), same),
    ),
]
MINIMAX_M3_SPARSE = Family(
    space(block(M3_INDEXED, M3_DENSE), block(M3_INDEXED, M3_MOE)),
    {},
    lambda: minimax_m3(
        ["minimax_m3_sparse", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=3,
        index_topk_blocks=3,
        index_local_blocks=2,
    ),
    [*M3_ROWS, *M3_INDEX],
)

LATEST = {
    "minimax_m3_sparse": MINIMAX_M3_SPARSE,
    "glm_moe_dsa_shared": GLM_5_SHARED,
    "gemma4": GEMMA_4,
    "gemma4_dense": GEMMA_4_DENSE,
    "minimax_m3": MINIMAX_M3,
}
