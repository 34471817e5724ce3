"""From an architecture to the config.json of a family whose attention differs by layer."""

from __future__ import annotations

from moenas.huggingface.layer_fields import (
    Layers,
    expert_fields,
    first_dense,
    head_fields,
    heads_alone,
    layer_words,
    rope_by_kind,
    scaled_weights,
    shared_experts,
    whole_fields,
    windows,
)
from moenas.records import Plain

PER_TOKEN = "num_experts_per_tok"


def mellum(m: Layers) -> Plain:
    """Mellum: positions by the kind of the layers."""
    return {
        **whole_fields(m),
        **heads_alone(m),
        **rope_by_kind(m),
        **windows(m),
        **expert_fields(m, "num_local_experts", "moe_intermediate_size", PER_TOKEN),
        "norm_topk_prob": m.router.get("normalize"),
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def flint(m: Layers) -> Plain:
    """Flint: sinks, and positions in layers with a window alone."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **windows(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        "shared_expert_intermediate_size": m.experts.get("d_shared"),
        "norm_topk_prob": m.router.get("normalize"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(m.sparse) if not sparse],
        "intermediate_size": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def laguna(m: Layers) -> Plain:
    """Laguna: heads and positions by layer, and gates of heads or of their elements."""
    gates = {"head": "per-head", "element": "per-element"}
    return {
        **whole_fields(m),
        **heads_alone(m),
        **rope_by_kind(m, partial=True),
        **windows(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        "num_attention_heads_per_layer": [(x["mixer"] or {}).get("n_heads") for x in m.blocks],
        "gating": gates.get(m.attention.get("output_gate", "none"), True),
        "moe_routed_scaling_factor": m.router.get("scale"),
        "moe_router_logit_softcapping": m.router.get("logits", {}).get("cap") or 0.0,
        "shared_expert_intermediate_size": m.experts.get("d_shared"),
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def kolibri1(m: Layers) -> Plain:
    """Kolibri 1: a bias on the logits of the router, and norms before and after the parts."""
    return {
        **whole_fields(m),
        **head_fields(m),
        **windows(m),
        **expert_fields(m, "num_local_experts", "moe_intermediate_size", PER_TOKEN),
        "shared_expert_intermediate_size": m.experts.get("d_shared"),
        "norm_topk_prob": m.router.get("normalize"),
    }


def beam(m: Layers) -> Plain:
    """Beam: gates with a bias, and layers without positions."""
    return {
        **whole_fields(m),
        **heads_alone(m),
        **rope_by_kind(m),
        **windows(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        **scaled_weights(m),
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
        "final_logit_softcapping": m.whole["logit_softcap"],
        "attention_bias": m.attention.get("qkv_bias", False),
    }


def mimo_v2_flash(m: Layers) -> Plain:
    """MiMo-V2-Flash: layers with a window have other numbers of keys, and sinks."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    full: Plain = next((x for x in mixers if x.get("window", 0) is None), {})
    local: Plain = next((x for x in mixers if x.get("window")), {})
    return {
        **whole_fields(m),
        **heads_alone(m),
        **rope_by_kind(m, partial=True),
        **windows(m),
        **expert_fields(m, "n_routed_experts", "moe_intermediate_size", PER_TOKEN),
        **scaled_weights(m),
        "num_key_value_heads": full.get("n_kv_heads"),
        "swa_num_key_value_heads": local.get("n_kv_heads"),
        "v_head_dim": m.attention.get("v_head_dim"),
        "attention_value_scale": None,  # in our weights
        "mlp_layer_types": layer_words(m),
        "intermediate_size": m.dense.get("d_ff"),
    }


def afmoe(m: Layers) -> Plain:
    """Trinity: gated attention, and positions in layers with a window alone."""
    scaled = scaled_weights(m)
    return {
        **whole_fields(m),
        **head_fields(m),
        **windows(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        "n_group": scaled["n_group"],
        "topk_group": scaled["topk_group"],
        "route_scale": scaled["routed_scaling_factor"],
        "num_shared_experts": shared_experts(m),
        "num_dense_layers": first_dense(m),
        "intermediate_size": m.dense.get("d_ff"),
        "mup_enabled": m.whole["embedding_multiplier"] != 1,
    }


def cohere2_moe(m: Layers) -> Plain:
    """Command A: attention and experts side by side."""
    return {
        **whole_fields(m, "layer_norm_eps"),
        **head_fields(m),
        **windows(m),
        **expert_fields(m, "num_experts", "intermediate_size", PER_TOKEN),
        "norm_topk_prob": m.router.get("normalize"),
        "logit_scale": m.whole["logit_multiplier"],
        "mlp_layer_types": layer_words(m),
        "first_k_dense_replace": 0,
        "num_shared_experts": 0,
    }


def minimax_m3_vl_text(m: Layers) -> Plain:
    """MiniMax-M3, the text model: some layers select blocks of keys."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    indexer: Plain = next((x["block_indexer"] for x in mixers if x.get("block_indexer")), {})
    words = ["minimax_m3_sparse" if x.get("block_indexer") else "full_attention" for x in mixers]
    limits = m.experts or m.dense
    return {
        **whole_fields(m),
        **head_fields(m, partial=True),
        **expert_fields(m, "num_local_experts", "intermediate_size", PER_TOKEN),
        "layer_types": words,
        "index_n_heads": m.attention.get("n_kv_heads"),
        "index_head_dim": indexer.get("head_dim"),
        "index_block_size": indexer.get("block"),
        "index_topk_blocks": indexer.get("top_blocks"),
        "index_local_blocks": indexer.get("local_blocks"),
        "swiglu_limit": limits.get("gate_limit"),
        "swiglu_alpha": limits.get("gate_alpha"),
        "routed_scaling_factor": m.router.get("scale"),
        "shared_intermediate_size": m.experts.get("d_shared"),
        "dense_intermediate_size": m.dense.get("d_ff"),
        "mlp_layer_types": layer_words(m),
    }


def gemma4_text(m: Layers) -> Plain:
    """Gemma 4: sizes of heads by layer, keys of earlier layers, a mixture beside each network."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    local: Plain = next((x for x in mixers if x.get("window")), {})
    full: Plain = next((x for x in mixers if x.get("window", 0) is None), {})
    usual = local or full
    names = {"head_dim": "head_dim", "num_key_value_heads": "n_kv_heads"}
    changed = {
        str(i): {theirs: x.get(ours) for theirs, ours in names.items()}
        for i, x in enumerate(mixers)
        if any(x.get(ours) != usual.get(ours) for ours in names.values())
    }
    widths = [block["ffn"].get("d_ff", 0) if block["ffn"] else 0 for block in m.blocks]
    mixture: Plain = next((x["shortcut"] for x in m.blocks if x["shortcut"]), {})
    n_shared = sum(x.get("kv_source") is not None for x in mixers)
    whole = whole_fields(m)
    whole["hidden_activation"] = whole.pop("hidden_act")
    return {
        **whole,
        **heads_alone(m),
        **rope_by_kind(m, partial=True),
        **windows(m),
        **{theirs: usual.get(ours) for theirs, ours in names.items()},
        "per_layer_config": changed,
        "hidden_size_per_layer_input": 0,
        "attention_bias": usual.get("qkv_bias", False),
        "attention_k_eq_v": full.get("k_eq_v", False),
        "num_kv_shared_layers": n_shared,
        # transformers 5.23 cannot skip tokens of layers with shared keys and without embeddings
        # of their own; it skips none where it returns the hidden states.
        "output_hidden_states": bool(n_shared) or None,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "final_logit_softcapping": m.whole["logit_softcap"],
        "enable_moe_block": bool(mixture),
        "num_experts": mixture.get("n_experts"),
        "moe_intermediate_size": mixture.get("d_expert"),
        "top_k_experts": mixture.get("router", {}).get("top_k"),
    }


def granitemoe_swa(m: Layers) -> Plain:
    """Granite MoE with sinks and windows; a theta of 0 stands for no positions."""
    mixers = [block["mixer"] or {} for block in m.blocks]
    ropes = [x.get("rope") or {} for x in mixers]
    thetas = [x["theta"] if x.get("partial_rotary_factor") else 0 for x in ropes]
    return {**granitemoeshared(m), **windows(m), "layer_rope_theta": thetas}


def granitemoeshared(m: Layers) -> Plain:
    """Granite MoE with a shared network beside the experts."""
    mixer = m.attention
    return {
        **whole_fields(m),
        **head_fields(m),
        **granite_factors(m),
        **expert_fields(m, "num_local_experts", "intermediate_size", PER_TOKEN),
        "shared_intermediate_size": m.experts.get("d_shared") or 0,
        "attention_bias": mixer.get("qkv_bias", False),
    }


def granite_factors(m: Layers) -> Plain:
    """Write the factors of a Granite model; `logits_scaling` divides."""
    mixer = m.attention
    return {
        "attention_multiplier": mixer.get("scale") or mixer.get("head_dim", 1) ** -0.5,
        "embedding_multiplier": m.whole["embedding_multiplier"],
        "residual_multiplier": m.whole["residual_multiplier"],
        "logits_scaling": 1 / m.whole["logit_multiplier"],
    }
