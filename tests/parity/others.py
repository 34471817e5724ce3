"""Further families: experts of heads, position biases, and newer models of known parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers as hf
from families import (
    ATTENDING,
    ATTENTION,
    DEEPSEEK_V3,
    HEAD_DIM,
    LATENT_SIZES,
    LAYER,
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
from torch import Tensor, nn
from variants import MOE, QWEN3_NEXT, SHARED
from weights import Row, same, stacked, stacked_transposed, transposed

# --- JetMoE: two blocks of ours are one layer of theirs -----------------------------------------


def jetmoe_rows(n_layers: int) -> list[Row]:
    rows: list[Row] = [
        ("embedding", ("model.embed_tokens.weight",), same),
        ("norm.weight", ("model.norm.weight",), same),
    ]
    for i in range(n_layers):
        heads, networks = f"blocks.{2 * i}.mixer.", f"blocks.{2 * i + 1}.ffn."
        layer = f"model.layers.{i}."
        theirs = layer + "self_attention.experts."
        rows += [
            (f"blocks.{2 * i}.norm1.weight", (layer + "input_layernorm.weight",), same),
            (heads + "router.logits.weight", (theirs + "router.layer.weight",), same),
            (heads + "experts.query", (theirs + "input_linear.weight",), transposed),
            (heads + "experts.out", (theirs + "output_linear.weight",), transposed),
            (heads + "bias", (theirs + "bias",), same),
            (heads + "attention.keys.weight", (layer + "self_attention.kv_proj.weight",), same),
        ]
        norm = f"blocks.{2 * i + 1}.norm2.weight"
        theirs = layer + "mlp."
        rows += [
            (norm, (layer + "post_attention_layernorm.weight",), same),
            (networks + "router.logits.weight", (theirs + "router.layer.weight",), same),
            (networks + "experts.up", (theirs + "input_linear.weight",), transposed),
            (networks + "experts.down", (theirs + "output_linear.weight",), transposed),
            (networks + "shared.bias", (theirs + "bias",), same),
        ]
    return rows


JETMOE = Family(
    "jetmoe_8b",
    shrink(
        {
            "0.blocks.0": {"mixer.head_dim": HEAD_DIM, "mixer.n_kv_heads": 2},
            "0.blocks.1": {"ffn.d_expert": 24},
            "0": {"repeat": 2},
        }
    ),
    lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=HEAD_DIM,
            intermediate_size=24,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    jetmoe_rows(2),
)

# --- Switch: the decoder alone, without cross-attention ------------------------------------------


class Decoder(nn.Module):
    """A decoder of T5's kind as a language model: its head is the embedding over sqrt(width)."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = SimpleNamespace(tie_word_embeddings=False)

    def set_attn_implementation(self, name: str) -> None:
        """Leave it: their attention with biases has one."""

    def set_experts_implementation(self, name: str) -> None:
        """Leave it: their experts are a loop."""

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        x = self.decoder(tokens).last_hidden_state * WIDTH**-0.5
        return SimpleNamespace(logits=x @ self.decoder.embed_tokens.weight.T)


def switch() -> Decoder:
    config = hf.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_DIM,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=8,
    )
    return Decoder(hf.SwitchTransformersForConditionalGeneration(config).decoder)


def switch_rows(n_layers: int) -> list[Row]:
    rows: list[Row] = [
        ("embedding", ("decoder.embed_tokens.weight",), same),
        ("norm.weight", ("decoder.final_layer_norm.weight",), same),
    ]
    attention = "decoder.block.{}.layer.0."
    names = tuple(f"{attention}SelfAttention.{x}.weight" for x in "qkv")
    table = attention + "SelfAttention.relative_attention_bias.weight"
    feed = "decoder.block.{}.layer.2."
    rows += [
        ("blocks.{}.mixer.qkv.weight", names, stacked),
        ("blocks.{}.mixer.out.weight", (attention + "SelfAttention.o.weight",), same),
        ("blocks.{}.mixer.attend.reach.bias.weight", (table,), same),
        ("blocks.{}.norm1.weight", (attention + "layer_norm.weight",), same),
        ("blocks.{}.norm2.weight", (feed + "layer_norm.weight",), same),
        ("blocks.{}.ffn.up.weight", (feed + "mlp.wi.weight",), same),
        ("blocks.{}.ffn.down.weight", (feed + "mlp.wo.weight",), same),
        ("blocks.{}.ffn.router.logits.weight", (feed + "mlp.router.classifier.weight",), same),
    ]
    for ours, theirs in (("up", "wi"), ("down", "wo")):
        experts = tuple(f"{feed}mlp.experts.expert_{i}.{theirs}.weight" for i in range(8))
        rows.append((f"blocks.{{}}.ffn.experts.{ours}", experts, stacked_transposed))
    return rows


SWITCH = Family(
    "switch_base_8",
    shrink(
        {
            "0.blocks.0": parts({"head_dim": HEAD_DIM, "n_heads": 4}, {"d_ff": 24}),
            "0.blocks.1": parts({"head_dim": HEAD_DIM, "n_heads": 4}, {"d_expert": 24}),
            "1.blocks.0": parts({"head_dim": HEAD_DIM, "n_heads": 4}, {"d_ff": 24}),
            "1.blocks.1": parts({"head_dim": HEAD_DIM, "n_heads": 4}, {"d_expert": 24}),
            "1": {"repeat": 1},
        },
        logit_multiplier=WIDTH**-0.5,
    ),
    switch,
    switch_rows(4),
    constants=(*(f"EncDecAttention.{x}.weight" for x in "qkvo"), "layer.1.layer_norm.weight"),
)

# --- known parts ----------------------------------------------------------------------------------

SOLAR = Family(
    "solar_open_100b",
    shrink({"0": parts(ATTENDING, MOE, repeat=2)}),
    lambda: hf.SolarOpenForCausalLM(
        hf.SolarOpenConfig(
            **SIZES, num_hidden_layers=2, moe_intermediate_size=24, n_routed_experts=16
        )
    ),
    [*WHOLE, qkv(), *experts(), *SHARED],
)

ARIA = Family(
    "aria",
    shrink({"0": parts({"head_dim": 8, "n_heads": 4}, MOE, repeat=2)}),
    lambda: hf.AriaTextForCausalLM(
        hf.AriaTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            moe_num_experts=16,
            moe_topk=6,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        )
    ),
    [
        *WHOLE,
        qkv(),
        ("blocks.{}.ffn.router.logits.weight", (LAYER + "mlp.router.weight",), same),
        ("blocks.{}.ffn.experts.up", (LAYER + "mlp.experts.gate_up_proj",), same),
        ("blocks.{}.ffn.experts.down", (LAYER + "mlp.experts.down_proj",), same),
        *SHARED,
    ],
)

GLM_FLASH = Family(
    "glm_4_7_flash",
    shrink(
        {
            "0": parts(RANKS, {"d_ff": 40}),
            "1": parts(RANKS, {"d_expert": 24, "n_experts": 32}, repeat=2),
        }
    ),
    lambda: hf.Glm4MoeLiteForCausalLM(
        hf.Glm4MoeLiteConfig(
            **{k: v for k, v in LATENT_SIZES.items() if k != "first_k_dense_replace"},
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ),
    DEEPSEEK_V3.table,
)

DELTA = LAYER + "linear_attn."
QWEN3_5 = Family(
    "qwen3_5_35b_a3b",
    QWEN3_NEXT.overrides,
    lambda: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(
            **SIZES,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
            },
        )
    ),
    [
        *(row for row in QWEN3_NEXT.table if not row[0].endswith("project.weight")),
        (
            "blocks.{}.mixer.project.weight",
            tuple(f"{DELTA}in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")),
            stacked,
        ),
    ],
)

TRINITY = Family(
    "trinity_mini",
    shrink(
        {
            "0": parts(ATTENDING | {"window": 5}, {"d_ff": 40}, repeat=1),
            "1": parts(ATTENDING | {"window": 5}, MOE),
            "2": parts(ATTENDING, MOE),
            "3.blocks.0": parts(ATTENDING | {"window": 5}, MOE, repeat=1),
            "3.blocks.1": parts(ATTENDING, MOE),
            "3": {"repeat": 1},
        },
        embedding_multiplier=WIDTH**0.5,
    ),
    lambda: hf.AfmoeForCausalLM(
        hf.AfmoeConfig(
            **SIZES,
            num_hidden_layers=5,
            layer_types=[
                f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")
            ],
            sliding_window=5,
            num_dense_layers=1,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=16,
            num_experts_per_tok=8,
            num_shared_experts=1,
            route_scale=2.826,
            mup_enabled=True,
        )
    ),
    [
        *WHOLE[:3],
        WHOLE[-1],
        ("blocks.{}.norm1.before.weight", (LAYER + "input_layernorm.weight",), same),
        ("blocks.{}.norm1.after.weight", (LAYER + "post_attention_layernorm.weight",), same),
        ("blocks.{}.norm2.before.weight", (LAYER + "pre_mlp_layernorm.weight",), same),
        ("blocks.{}.norm2.after.weight", (LAYER + "post_mlp_layernorm.weight",), same),
        qkv(),
        *QK_NORMS,
        ("blocks.{}.mixer.gate.weight", (ATTENTION + "gate_proj.weight",), same),
        *dense("ffn", LAYER + "mlp."),
        *experts("mlp.router.gate"),
        ("blocks.{}.ffn.balance.bias", (LAYER + "mlp.expert_bias",), same),
        *SHARED,
    ],
)

OTHERS = {
    family.zoo: family for family in (JETMOE, SWITCH, SOLAR, ARIA, GLM_FLASH, QWEN3_5, TRINITY)
}
