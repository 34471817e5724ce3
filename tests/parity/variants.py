"""Families with parts of their own: shortcuts, cut queries, parallel blocks, linear attention."""

from __future__ import annotations

import torch
import transformers as hf
from families import (
    ATTENDING,
    ATTENTION,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LATENT,
    LAYER,
    MAMBA,
    QK_NORMS,
    RANKS,
    SIZES,
    VOCABULARY,
    WHOLE,
    WIDTH,
    Family,
    dense,
    experts,
    parts,
    qkv,
    shrink,
)
from torch import Tensor
from weights import (
    Row,
    first_row,
    first_transposed,
    from_one,
    same,
    squeezed,
    stacked,
    transposed,
    turned,
)

MOE = {"d_expert": 24, "n_experts": 16}
SHARED = dense("ffn.shared", LAYER + "mlp.shared_experts.")


def renamed(table: list[Row], old: str, new: str) -> list[Row]:
    """Write other names of theirs."""
    return [(ours, tuple(n.replace(old, new) for n in names), f) for ours, names, f in table]


# --- LongCat-Flash: two blocks of ours are one layer of theirs ----------------------------------


def longcat_rows(n_layers: int) -> list[Row]:
    rows: list[Row] = [(o, n, f) for o, n, f in WHOLE if "{}" not in o]
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        moe, ours = layer + "mlp.", f"blocks.{2 * i}.shortcut.ffn."
        rows += [
            (ours + "router.logits.weight", (moe + "router.classifier.weight",), same),
            (ours + "balance.bias", (moe + "router.e_score_correction_bias",), same),
            (ours + "experts.up", (moe + "experts.gate_up_proj",), first_transposed(16)),
            (ours + "experts.down", (moe + "experts.down_proj",), transposed),
        ]
        for j in range(2):
            block = f"blocks.{2 * i + j}."
            for name, norm in (("norm1", "input"), ("norm2", "post_attention")):
                rows.append(
                    (f"{block}{name}.weight", (f"{layer}{norm}_layernorm.{j}.weight",), same)
                )
            for o, names, form in [*LATENT, WHOLE[-1], *dense("ffn", LAYER + "mlps.")]:
                written = (n.replace("self_attn.", f"self_attn.{j}.") for n in names)
                written = (n.replace("mlps.", f"mlps.{j}.") for n in written)
                rows.append((o.format(2 * i + j), tuple(n.format(i) for n in written), form))
    return rows


ZEROS = {"n_experts": 16, "d_expert": 24, "n_zero_experts": 8}
LONGCAT = Family(
    "longcat_flash",
    shrink(
        {
            "0.blocks.0": parts(RANKS, {"d_ff": 40})
            | {f"shortcut.{name}": value for name, value in ZEROS.items()},
            "0.blocks.1": parts(RANKS, {"d_ff": 40}),
            "0": {"repeat": 2},
        }
    ),
    lambda: hf.LongcatFlashForCausalLM(
        hf.LongcatFlashConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=40,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            head_dim=8,
            v_head_dim=8,
            n_routed_experts=16,
            zero_expert_num=8,
            expert_ffn_hidden_size=24,
        )
    ),
    longcat_rows(2),
)

# --- softmax attention --------------------------------------------------------------------------


def of_experts(*matrices: Tensor) -> Tensor:
    """The rows of 8 experts, of one or more matrices, as a stack."""
    return torch.cat([x.unflatten(0, (8, -1)) for x in matrices], dim=1)


def of_experts_transposed(*matrices: Tensor) -> Tensor:
    return of_experts(*matrices).mT


BLOCK = "transformer.blocks.{}."
DBRX = Family(
    "dbrx",
    shrink(
        {
            "0": parts(
                {"head_dim": 8, "n_heads": 4, "n_kv_heads": 2, "qkv_clip": 0.5},
                {"d_expert": 24, "n_experts": 8},
                repeat=2,
            )
        }
    ),
    lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            n_heads=4,
            n_layers=2,
            attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 500000.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 4},
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    ),
    [
        ("embedding", ("transformer.wte.weight",), same),
        ("norm.weight", ("transformer.norm_f.weight",), same),
        ("head.weight", ("lm_head.weight",), same),
        ("blocks.{}.norm1.weight", (BLOCK + "norm_attn_norm.norm_1.weight",), same),
        ("blocks.{}.norm2.weight", (BLOCK + "norm_attn_norm.norm_2.weight",), same),
        ("blocks.{}.mixer.qkv.weight", (BLOCK + "norm_attn_norm.attn.Wqkv.weight",), same),
        ("blocks.{}.mixer.out.weight", (BLOCK + "norm_attn_norm.attn.out_proj.weight",), same),
        ("blocks.{}.ffn.router.logits.weight", (BLOCK + "ffn.router.layer.weight",), same),
        (
            "blocks.{}.ffn.experts.up",
            (BLOCK + "ffn.experts.mlp.w1", BLOCK + "ffn.experts.mlp.v1"),
            of_experts_transposed,
        ),
        ("blocks.{}.ffn.experts.down", (BLOCK + "ffn.experts.mlp.w2",), of_experts),
    ],
)

HUNYUAN = Family(
    "hunyuan_a13b",
    # Its theta and alpha, as the file has them, at this width of a head.
    shrink({"0": parts(ATTENDING | {"rope.theta": 1e4 * 1e3 ** (16 / 14)}, MOE, repeat=2)}),
    lambda: hf.HunYuanMoEV1ForCausalLM(
        hf.HunYuanMoEV1Config(
            **SIZES,
            num_hidden_layers=2,
            intermediate_size=24,
            num_experts=16,
            moe_topk=8,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "alpha": 1000.0,
                "factor": 1.0,
            },
        )
    ),
    [
        *WHOLE,
        qkv(),
        ("blocks.{}.mixer.norm.q.weight", (ATTENTION + "query_layernorm.weight",), same),
        ("blocks.{}.mixer.norm.k.weight", (ATTENTION + "key_layernorm.weight",), same),
        *experts("mlp.gate.wg"),
        *dense("ffn.shared", LAYER + "mlp.shared_mlp."),
    ],
)

MINIMAX_M2 = Family(
    "minimax_m2",
    shrink({"0": parts(ATTENDING, MOE, repeat=2)}),
    lambda: hf.MiniMaxM2ForCausalLM(
        hf.MiniMaxM2Config(
            **SIZES,
            num_hidden_layers=2,
            intermediate_size=24,
            num_local_experts=16,
            bos_token_id=0,
            eos_token_id=1,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    [
        *WHOLE,
        qkv(),
        *QK_NORMS,
        *experts(),
        ("blocks.{}.ffn.balance.bias", (LAYER + "mlp.e_score_correction_bias",), same),
    ],
)

SHARED_GATE: list[Row] = [
    *dense("ffn.shared", LAYER + "mlp.shared_expert."),
    ("blocks.{}.ffn.shared.gate.weight", (LAYER + "mlp.shared_expert_gate.weight",), same),
]
QWEN2_MOE = Family(
    "qwen1_5_moe_a2_7b",
    shrink({"0": parts({"head_dim": 8, "n_heads": 4}, MOE | {"d_shared": 40}, repeat=2)}),
    lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_hidden_layers=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ),
    [*WHOLE, qkv(), qkv("bias"), *experts(), *SHARED_GATE],
)


def turned_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turn = turned(HEADS, HEAD_DIM, HEAD_DIM), turned(KV_HEADS, HEAD_DIM, HEAD_DIM)
    return stacked(turn[0](q), turn[1](k), v)


ERNIE = Family(
    "ernie_4_5_21b_a3b",
    shrink({"0": parts(ATTENDING, {"d_ff": 40}), "1": parts(ATTENDING, MOE, repeat=2)}),
    lambda: hf.Ernie4_5_MoeForCausalLM(
        hf.Ernie4_5_MoeConfig(
            **SIZES,
            num_hidden_layers=3,
            intermediate_size=40,
            moe_intermediate_size=24,
            moe_num_experts=16,
            moe_layer_end_index=2,
        )
    ),
    [
        *WHOLE,
        ("blocks.{}.mixer.qkv.weight", qkv()[1], turned_qkv),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
        (
            "blocks.{}.ffn.balance.bias",
            (LAYER + "mlp.gate.moe_statics.e_score_correction_bias",),
            first_row,
        ),
        *SHARED,
    ],
)

WIDE_VALUES = {
    "head_dim": 16,
    "v_head_dim": 8,
    "n_heads": 4,
    "rope.partial_rotary_factor": 0.5,
}
MIMO_TURNS = {"full_attention": 5e6, "sliding_attention": 1e4}
MIMO = Family(
    "mimo_v2_flash",
    shrink(
        {
            "0": parts(WIDE_VALUES | {"n_kv_heads": 2}, {"d_ff": 40}),
            "1": parts(WIDE_VALUES | {"n_kv_heads": 4, "window": 5}, MOE, repeat=1),
            "2.blocks.0": parts(WIDE_VALUES | {"n_kv_heads": 2}, MOE),
            "2.blocks.1": parts(WIDE_VALUES | {"n_kv_heads": 4, "window": 5}, MOE, repeat=1),
            "2": {"repeat": 1},
            "3": parts(WIDE_VALUES | {"n_kv_heads": 2}, MOE),
        }
    ),
    lambda: hf.MiMoV2FlashForCausalLM(
        hf.MiMoV2FlashConfig(
            **SIZES,
            v_head_dim=8,
            num_hidden_layers=5,
            intermediate_size=40,
            moe_intermediate_size=24,
            n_routed_experts=16,
            sliding_window=5,
            layer_types=[f"{x}_attention" for x in ("full", "sliding", "full", "sliding", "full")],
            mlp_layer_types=["dense"] + 4 * ["sparse"],
            attention_value_scale=None,  # here a part of the weights
            rope_parameters={
                name: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for name, theta in MIMO_TURNS.items()
            },
        )
    ),
    [
        *WHOLE,
        qkv(),
        ("blocks.{}.mixer.attend.sinks", (ATTENTION + "sinks",), same),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
    ],
)

PARALLEL = """
architecture:
  vocab_size: 256
  d_model: 32
  norm: layernorm
  norm_eps: 1e-5
  logit_multiplier: 0.0625
  blocks:
    - mixer: {kind: attention, head_dim: 16, n_heads: 4, n_kv_heads: 2, window: 5}
      ffn: &moe {kind: moe, n_experts: 8, d_expert: 24, router: {top_k: 2, normalize: true}}
      parallel: true
    - mixer: {kind: attention, head_dim: 16, n_heads: 4, n_kv_heads: 2, rope: {partial_rotary_factor: 0}}
      ffn: {kind: moe, n_experts: 8, d_expert: 24, router: {top_k: 2, normalize: true}}
      parallel: true
objectives: [active_params]
""".replace("&moe ", "")
COMMAND = Family(
    PARALLEL,
    {},
    lambda: hf.Cohere2MoeForCausalLM(
        hf.Cohere2MoeConfig(
            **SIZES,
            num_hidden_layers=2,
            intermediate_size=24,
            num_experts=8,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=5,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    [*WHOLE[:4], WHOLE[-1], ("blocks.{}.mixer.qkv.weight", qkv()[1], turned_qkv), *experts()],
)

# --- hybrids ------------------------------------------------------------------------------------

CONV = LAYER + "conv."
LFM2_TYPES = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
LFM2 = Family(
    "lfm2_8b_a1b",
    shrink(
        {
            "0": {"ffn.d_ff": 40, "repeat": 2},
            **{
                f"{i}.blocks.{j}": fields
                for i in (1, 2)
                for j, fields in enumerate(
                    (
                        parts({"head_dim": 8, "n_heads": 4, "n_kv_heads": 2}, MOE),
                        parts({}, MOE, repeat=1),
                    )
                )
            },
            "1": {"repeat": 1},
            "2": {"repeat": 1},
        }
    ),
    lambda: hf.Lfm2MoeForCausalLM(
        hf.Lfm2MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_hidden_layers=6,
            num_experts=16,
            layer_types=LFM2_TYPES,
        )
    ),
    [
        ("embedding", ("model.embed_tokens.weight",), same),
        ("norm.weight", ("model.embedding_norm.weight",), same),
        ("blocks.{}.norm1.weight", (LAYER + "operator_norm.weight",), same),
        ("blocks.{}.norm2.weight", (LAYER + "ffn_norm.weight",), same),
        ("blocks.{}.mixer.project.weight", (CONV + "in_proj.weight",), same),
        ("blocks.{}.mixer.convolution.weight", (CONV + "conv.weight",), squeezed),
        ("blocks.{}.mixer.out.weight", (CONV + "out_proj.weight",), same),
        qkv(),
        ("blocks.{}.mixer.out.weight", (ATTENTION + "out_proj.weight",), same),
        ("blocks.{}.mixer.norm.q.weight", (ATTENTION + "q_layernorm.weight",), same),
        ("blocks.{}.mixer.norm.k.weight", (ATTENTION + "k_layernorm.weight",), same),
        (
            "blocks.{}.ffn.up.weight",
            (LAYER + "feed_forward.w1.weight", LAYER + "feed_forward.w3.weight"),
            stacked,
        ),
        ("blocks.{}.ffn.down.weight", (LAYER + "feed_forward.w2.weight",), same),
        *experts("feed_forward.gate", "feed_forward.experts"),
        ("blocks.{}.ffn.balance.bias", (LAYER + "feed_forward.expert_bias",), same),
    ],
)

GRANITE_MOE = MOE | {"d_shared": 40}
GRANITE_STATE = {"n_heads": 4, "head_dim": 16, "d_state": 6}
GRANITE_4 = Family(
    "granite_4_0_h_tiny",
    shrink(
        {
            "0.blocks.0": parts(GRANITE_STATE, GRANITE_MOE, repeat=2),
            "0.blocks.1": parts({"head_dim": 8, "n_heads": 4, "n_kv_heads": 2}, GRANITE_MOE),
            "0.blocks.2": parts(GRANITE_STATE, GRANITE_MOE, repeat=1),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=4,
            layer_types=[f"{x}_attention" for x in ("linear", "linear", "full", "linear")],
            mamba_n_heads=4,
            mamba_d_state=6,
            intermediate_size=24,
            shared_intermediate_size=40,
            num_local_experts=16,
            num_experts_per_tok=6,
            rms_norm_eps=1e-5,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0078125,
            logits_scaling=6.0,
            tie_word_embeddings=True,
        )
    ),
    [
        *WHOLE,
        qkv(),
        *MAMBA,
        ("blocks.{}.mixer.convolution.weight", (LAYER + "mamba.conv1d.weight",), squeezed),
        ("blocks.{}.mixer.norm.weight", (LAYER + "mamba.norm.weight",), same),
        ("blocks.{}.mixer.dt_bias", (LAYER + "mamba.dt_bias",), same),
        *experts("block_sparse_moe.router", "block_sparse_moe.experts"),
        ("blocks.{}.ffn.shared.up.weight", (LAYER + "shared_mlp.input_linear.weight",), same),
        ("blocks.{}.ffn.shared.down.weight", (LAYER + "shared_mlp.output_linear.weight",), same),
    ],
)

KEY, VALUE, KEY_HEADS, RATIO = 8, 16, 2, 2
"""Widths of a key and a value, key heads, and value heads for each of them."""


def delta_project(qkvz: Tensor, ba: Tensor) -> Tensor:
    """Rows by key head (q, k, its values and gates; its betas and steps), as rows by kind."""
    widths = (KEY, KEY, RATIO * VALUE, RATIO * VALUE)
    q, k, v, z = qkvz.unflatten(0, (KEY_HEADS, -1)).split(widths, dim=1)
    b, a = ba.unflatten(0, (KEY_HEADS, -1)).chunk(2, dim=1)
    return torch.cat([x.flatten(0, 1) for x in (q, k, v, z, b, a)])


def queries(q: Tensor) -> Tensor:
    """The rows of queries, of heads that have those of their gate behind them."""
    return q.unflatten(0, (HEADS, 2, HEAD_DIM))[:, 0].flatten(0, 1)


def queries_stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return stacked(queries(q), k, v)


def gates(q: Tensor) -> Tensor:
    return q.unflatten(0, (HEADS, 2, HEAD_DIM))[:, 1].flatten(0, 1)


DELTA = LAYER + "linear_attn."
QWEN3_NEXT_MOE = MOE | {"d_shared": 40}
QWEN3_NEXT = Family(
    "qwen3_next_80b_a3b",
    shrink(
        {
            "0.blocks.0": parts(
                {"n_heads": 4, "n_key_heads": 2, "key_dim": KEY, "value_dim": VALUE},
                QWEN3_NEXT_MOE,
                repeat=1,
            ),
            "0.blocks.1": parts(ATTENDING, QWEN3_NEXT_MOE),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **SIZES,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=KEY,
            linear_value_head_dim=VALUE,
            linear_num_key_heads=KEY_HEADS,
            linear_num_value_heads=KEY_HEADS * RATIO,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
            },
        )
    ),
    [
        *((o, n, from_one if "norm" in o else f) for o, n, f in [*WHOLE, *QK_NORMS]),
        *experts(),
        *SHARED_GATE,
        ("blocks.{}.mixer.qkv.weight", qkv()[1], queries_stacked),
        ("blocks.{}.mixer.gate.weight", (ATTENTION + "q_proj.weight",), gates),
        (
            "blocks.{}.mixer.project.weight",
            (DELTA + "in_proj_qkvz.weight", DELTA + "in_proj_ba.weight"),
            delta_project,
        ),
        ("blocks.{}.mixer.convolution.weight", (DELTA + "conv1d.weight",), squeezed),
        ("blocks.{}.mixer.log_rate", (DELTA + "A_log",), same),
        ("blocks.{}.mixer.dt_bias", (DELTA + "dt_bias",), same),
        ("blocks.{}.mixer.norm.weight", (DELTA + "norm.weight",), same),
        ("blocks.{}.mixer.out.weight", (DELTA + "out_proj.weight",), same),
    ],
)

KDA_LAYER = LAYER + "self_attn."
KDA: list[Row] = [
    *(
        (f"blocks.{{}}.mixer.{ours}", (f"{KDA_LAYER}{theirs}",), same)
        for ours, theirs in {
            "decay.dt_bias": "forget_gate.dt_bias",
            "decay.project.down.weight": "forget_gate.f_a_proj.weight",
            "decay.project.up.weight": "forget_gate.f_b_proj.weight",
            "decay.project.weight": "forget_gate.f_proj.weight",
            "gate.down.weight": "g_a_proj.weight",
            "gate.up.weight": "g_b_proj.weight",
            "norm.weight": "o_norm.weight",
        }.items()
    ),
    ("blocks.{}.mixer.decay.log_rate", (KDA_LAYER + "forget_gate.A_log",), torch.flatten),
    (
        "blocks.{}.mixer.project.weight",
        tuple(f"{KDA_LAYER}{x}_proj.weight" for x in "qkvb"),
        stacked,
    ),
    ("blocks.{}.mixer.convolution.weight", (KDA_LAYER + "conv1d.weight",), squeezed),
]
NOPE = {"n_heads": 4, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "v_dim": 8}
KIMI_DELTA = {"n_heads": 4, "key_dim": 8, "value_dim": 8, "rank": 8}
KIMI_TYPES = "lllflfllf"
KIMI_LINEAR = Family(
    "kimi_linear_48b_a3b",
    shrink(
        {
            "0": parts(KIMI_DELTA, {"d_ff": 40}),
            "1": parts(KIMI_DELTA, MOE),
            "2": parts(NOPE, MOE),
            "3.blocks.0": parts(KIMI_DELTA, MOE, repeat=1),
            "3.blocks.1": parts(NOPE, MOE),
            "3": {"repeat": 1},
            "4": parts(KIMI_DELTA, MOE),
            "5": parts(NOPE, MOE),
        }
    ),
    lambda: hf.KimiLinearForCausalLM(
        hf.KimiLinearConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=8,
            num_hidden_layers=9,
            layer_types=[
                "full_attention" if kind == "f" else "linear_attention" for kind in KIMI_TYPES
            ],
            linear_head_dim=8,
            linear_num_heads=4,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    [
        *WHOLE,
        *KDA,
        *(
            (f"blocks.{i}.mixer.query.weight", (f"{ATTENTION.format(i)}q_proj.weight",), same)
            for i, kind in enumerate(KIMI_TYPES)
            if kind == "f"
        ),
        *((o, n, same) for o, n, _ in LATENT if "keys" in o),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
        *SHARED,
    ],
    1e-4,  # transformers' own logits in float32 are 5e-5 away from those in float64
)

LING_HYBRID = """
architecture:
  vocab_size: 256
  d_model: 32
  tie_embeddings: false
  blocks:
    - mixer: {kind: kimi_delta, n_heads: 4, key_dim: 8, value_dim: 8, decay_limit: 5.0}
      ffn: {kind: dense, d_ff: 40}
    - mixer:
        kind: latent_attention
        n_heads: 4
        kv_rank: 16
        nope_dim: 16
        rope_dim: 8
        v_dim: 8
        rope: {theta: 6e6}
        output_gate: head
      ffn:
        kind: moe
        n_experts: 16
        d_expert: 24
        n_shared_experts: 1
        router: {preset: deepseek_v3, selection: {kind: top_k, n_groups: 8, top_groups: 4, group_score: top2_sum}}
objectives: [active_params]
"""
LING = Family(
    LING_HYBRID,
    {},
    lambda: hf.BailingHybridForCausalLM(
        hf.BailingHybridConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=4,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            head_dim=8,
            v_head_dim=8,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse"],
            linear_head_dim=8,
            linear_num_heads=4,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    [
        *WHOLE,
        *KDA,
        ("blocks.0.mixer.gate.weight", (KDA_LAYER.format(0) + "g_proj.weight",), same),
        ("blocks.1.mixer.gate.weight", (KDA_LAYER.format(1) + "g_proj.weight",), same),
        ("blocks.1.mixer.query.weight", (KDA_LAYER.format(1) + "q_proj.weight",), turned(4, 24, 8)),
        *((o, n, f) for o, n, f in LATENT if "keys" in o),
        *dense("ffn", LAYER + "mlp."),
        *experts(),
        *SHARED,
    ],
    3e-5,  # as Kimi Linear, with fewer layers
)


def by_kind(qkv: Tensor) -> Tensor:
    """Rows by head (query, key, value) as all queries, all keys, all values."""
    return qkv.unflatten(0, (HEADS, 3, HEAD_DIM)).transpose(0, 1).flatten(0, 2)


DEEP_NORM = 3.5565588200778455
MINIMAX_01 = Family(
    "minimax_text_01",
    shrink(
        {
            "0.blocks.0": parts({"n_heads": 4, "head_dim": 16}, MOE, repeat=2),
            # Theirs turn whole heads; the released rotary_dim is half of one.
            "0.blocks.1": parts(ATTENDING | {"rope.partial_rotary_factor": 1}, MOE),
            "0": {"repeat": 1},
        }
    ),
    lambda: hf.MiniMaxForCausalLM(
        hf.MiniMaxConfig(
            **SIZES,
            num_hidden_layers=3,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            block_size=7,
            intermediate_size=24,
            num_local_experts=16,
            **{f"{part}_alpha_factor": DEEP_NORM for part in ("full_attn", "linear_attn", "mlp")},
            rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        )
    ),
    [
        ("embedding", ("model.embed_tokens.weight",), same),
        ("head.weight", ("lm_head.weight",), same),
        # A norm after a part of ours is the one before the next part of theirs.
        ("stem.norm.weight", ("model.layers.0.input_layernorm.weight",), same),
        ("blocks.{}.norm1.weight", (LAYER + "post_attention_layernorm.weight",), same),
        ("blocks.0.norm2.weight", ("model.layers.1.input_layernorm.weight",), same),
        ("blocks.1.norm2.weight", ("model.layers.2.input_layernorm.weight",), same),
        ("blocks.2.norm2.weight", ("model.norm.weight",), same),
        ("blocks.{}.mixer.project.weight", (LAYER + "self_attn.qkv_proj.weight",), by_kind),
        ("blocks.{}.mixer.gate.weight", (LAYER + "self_attn.output_gate.weight",), same),
        ("blocks.{}.mixer.norm.weight", (LAYER + "self_attn.norm.weight",), same),
        ("blocks.{}.mixer.out.weight", (LAYER + "self_attn.out_proj.weight",), same),
        qkv(),
        WHOLE[-1],
        *experts(),
    ],
    constants=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
)

FLEX_OLMO_SPACE = """
architecture:
  vocab_size: 256
  d_model: 32
  norm_position: output
  tie_embeddings: false
  blocks:
    - repeat: 2
      mixer: {kind: attention, head_dim: 8, n_kv_heads: 2, qk_norm: full, rope: {theta: 500000}}
      ffn: {kind: moe, n_experts: 7, d_expert: 24, router: {top_k: 5, normalize: false}}
objectives: [active_params]
"""
FLEX_OLMO = Family(
    FLEX_OLMO_SPACE,
    {},
    lambda: hf.FlexOlmoForCausalLM(
        hf.FlexOlmoConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=24,
            pad_token_id=0,
            eos_token_id=1,
        )
    ),
    [
        *WHOLE[:3],
        WHOLE[-1],
        ("blocks.{}.norm1.weight", (LAYER + "post_attention_layernorm.weight",), same),
        ("blocks.{}.norm2.weight", (LAYER + "post_feedforward_layernorm.weight",), same),
        qkv(),
        *QK_NORMS,
        *experts(),
    ],
)

VARIANTS: dict[str, Family] = {
    family.zoo: family
    for family in (
        LONGCAT,
        DBRX,
        HUNYUAN,
        MINIMAX_M2,
        QWEN2_MOE,
        ERNIE,
        MIMO,
        LFM2,
        GRANITE_4,
        QWEN3_NEXT,
        KIMI_LINEAR,
        MINIMAX_01,
    )
} | {
    "command": COMMAND,
    "flex_olmo": FLEX_OLMO,
    "ling_hybrid": LING,
}
