"""Families whose attention is of another kind: experts of heads, position biases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers as hf
from families import HEAD_DIM, VOCABULARY, WIDTH, Family, parts, shrink
from torch import Tensor, nn
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
        ("blocks.{}.mixer.attend.bias.weight", (table,), same),
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

HEADS_FAMILIES = {family.zoo: family for family in (JETMOE, SWITCH)}
