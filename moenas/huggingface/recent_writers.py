"""From an architecture to the config.json of a family whose layers differ in kind."""

from __future__ import annotations

from moenas.huggingface.layer_fields import (
    Layers,
    expert_fields,
    first_dense,
    head_fields,
    latent_fields,
    layer_words,
    scaled_weights,
    shared_experts,
    whole_fields,
    windows,
)
from moenas.records import Plain

PER_TOKEN = "num_experts_per_tok"


def indexed(m: Layers) -> Plain:
    """Write latent attention with token indexers, and experts after the first dense layers."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    indexer: Plain = next((x["indexer"] for x in mixers if x.get("indexer")), {})
    return {
        **whole_fields(m),
        **latent_fields(m),
        **expert_fields(m, "n_routed_experts", "moe_intermediate_size", PER_TOKEN),
        **scaled_weights(m),
        "n_shared_experts": shared_experts(m),
        "first_k_dense_replace": first_dense(m),
        "intermediate_size": m.dense.get("d_ff"),
        "index_n_heads": indexer.get("n_heads"),
        "index_head_dim": indexer.get("head_dim"),
        "index_topk": indexer.get("top_k"),
    }


def axk1(m: Layers) -> Plain:
    """A.X K1: DeepSeek-V3 with a norm of the output of each mixture."""
    return {k: v for k, v in indexed(m).items() if not k.startswith("index_")}


def glm_moe_dsa(m: Layers) -> Plain:
    """GLM-5: layers can share an indexer."""
    shared = [bool((block["mixer"] or {}).get("index_shared")) for block in m.blocks]
    return {**indexed(m), "indexer_types": ["shared" if x else "full" for x in shared]}


def exaone_moe(m: Layers) -> Plain:
    """K-EXAONE."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **windows(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        **scaled_weights(m),
        "num_shared_experts": shared_experts(m),
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
    }


def hy_v3(m: Layers) -> Plain:
    """Hunyuan 3."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        "router_scaling_factor": m.router.get("scale"),
        "num_shared_experts": shared_experts(m),
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def qwen3_next(m: Layers) -> Plain:
    """Qwen3-Next: gated delta nets and gated attention."""
    names = {
        "linear_num_value_heads": "n_heads",
        "linear_num_key_heads": "n_key_heads",
        "linear_key_head_dim": "key_dim",
        "linear_value_head_dim": "value_dim",
        "linear_conv_kernel_dim": "d_conv",
    }
    delta = m.first("mixer", "gated_delta")
    linear = [bool(x["mixer"]) and x["mixer"]["kind"] == "gated_delta" for x in m.blocks]
    return {
        **whole_fields(m),
        **head_fields(m, partial=True),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        **{theirs: delta.get(ours) for theirs, ours in names.items()},
        "layer_types": ["linear_attention" if x else "full_attention" for x in linear],
        "shared_expert_intermediate_size": m.experts.get("d_shared"),
        "norm_topk_prob": m.router.get("normalize"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def llama4_text(m: Layers) -> Plain:
    """Llama 4, the text model."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    still = [x for x in mixers if x.get("rope") and not x["rope"]["partial_rotary_factor"]]
    tempered = next((x for x in still if x.get("floor_scale")), None)
    scales = {} if tempered is None else {k: tempered[k] for k in ("floor_scale", "attn_scale")}
    return {
        **whole_fields(m),
        **head_fields(m),
        **expert_fields(m, "num_local_experts", "intermediate_size", PER_TOKEN),
        **scales,
        "attn_temperature_tuning": tempered is not None,
        "attention_chunk_size": m.attention.get("chunk"),
        "use_qk_norm": m.attention.get("qk_norm") == "weightless",
        "no_rope_layers": [int(x not in still) for x in mixers],
        "moe_layers": [i for i, sparse in enumerate(m.sparse) if sparse],
        "intermediate_size_mlp": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }
