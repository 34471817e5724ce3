"""From an architecture to the config.json of a family with state spaces or convolutions."""

from __future__ import annotations

from moenas.huggingface.layer_fields import (
    Layers,
    expert_fields,
    first_dense,
    head_fields,
    heads_alone,
    latent_fields,
    layer_words,
    scaled_weights,
    shared_experts,
    whole_fields,
)
from moenas.huggingface.windowed_writers import PER_TOKEN, granitemoeshared
from moenas.records import Plain


def kinds(m: Layers) -> list[str]:
    """Return the kind of the mixer of each layer."""
    return [block["mixer"]["kind"] if block["mixer"] else "" for block in m.blocks]


def granitemoehybrid(m: Layers) -> Plain:
    """Granite 4.0: Mamba-2 layers, and a few of attention, with or without positions."""
    state = m.first("mixer", "mamba2")
    names = {
        "mamba_n_heads": "n_heads",
        "mamba_d_head": "head_dim",
        "mamba_d_state": "d_state",
        "mamba_n_groups": "n_state_groups",
        "mamba_d_conv": "d_conv",
        "mamba_conv_bias": "conv_bias",
        "mamba_proj_bias": "proj_bias",
    }
    turned = bool(m.attention) and m.attention["rope"]["partial_rotary_factor"] > 0
    width = state.get("n_heads", 0) * state.get("head_dim", 0)
    experts = m.experts.get("n_experts", 0)
    return {
        **granitemoeshared(m),
        **{theirs: state.get(ours) for theirs, ours in names.items()},
        "mamba_expand": width // m.whole["d_model"] or None,
        "layer_types": [
            "linear_attention" if kind == "mamba2" else "full_attention" for kind in kinds(m)
        ],
        "position_embedding_type": "rope" if turned else "nope",
        "num_local_experts": experts,
        "shared_intermediate_size": (m.experts.get("d_shared") if experts else m.dense.get("d_ff")),
    }


def jamba(m: Layers) -> Plain:
    """Jamba: Mamba layers, attention and experts, each at its period."""
    state = m.first("mixer", "mamba")
    full = [kind == "attention" for kind in kinds(m)]
    (every, at), (period, offset) = _period(full), _period(m.sparse)
    names = {
        "mamba_d_state": "d_state",
        "mamba_dt_rank": "dt_rank",
        "mamba_d_conv": "d_conv",
        "mamba_conv_bias": "conv_bias",
        "mamba_proj_bias": "proj_bias",
    }
    experts = expert_fields(m, "num_experts", "d_expert", PER_TOKEN)
    return {
        **whole_fields(m),
        **heads_alone(m),
        **{k: v for k, v in experts.items() if k != "d_expert"},
        **{theirs: state.get(ours) for theirs, ours in names.items()},
        "num_experts": m.experts.get("n_experts", 1),
        "mamba_expand": state.get("d_inner", 0) // m.whole["d_model"] or None,
        "attn_layer_period": every,
        "attn_layer_offset": at,
        "expert_layer_period": period,
        "expert_layer_offset": offset,
        "intermediate_size": m.experts.get("d_expert") or m.dense.get("d_ff"),
        "use_mamba_kernels": False,
    }


def _period(chosen: list[bool]) -> tuple[int, int]:
    """Return the distance of the chosen layers and the number of the first; none is beyond all."""
    places = [i for i, one in enumerate(chosen) if one]
    if not places:
        return len(chosen) + 1, len(chosen)
    return (places[1] - places[0] if len(places) > 1 else len(chosen)), places[0]


def lfm2_moe(m: Layers) -> Plain:
    """LFM2: gated short convolutions, with a few layers of attention."""
    conv, scaled = m.first("mixer", "short_conv"), scaled_weights(m)
    return {
        **whole_fields(m, "norm_eps"),
        **head_fields(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", PER_TOKEN),
        "layer_types": ["conv" if kind == "short_conv" else "full_attention" for kind in kinds(m)],
        "conv_bias": conv.get("bias", False),
        "conv_L_cache": conv.get("d_conv"),
        "num_dense_layers": first_dense(m),
        "intermediate_size": m.dense.get("d_ff"),
        "routed_scaling_factor": scaled["routed_scaling_factor"],
        "norm_topk_prob": scaled["norm_topk_prob"],
        "use_expert_bias": True,
    }


def nemotron_h(m: Layers) -> Plain:
    """Nemotron-H: each layer is one part."""
    state, words = m.first("mixer", "mamba2"), {"mamba2": "mamba", "dense": "mlp"}
    parts = [part["kind"] for x in m.blocks for part in (x["mixer"], x["ffn"]) if part]
    names = {
        "mamba_num_heads": "n_heads",
        "mamba_head_dim": "head_dim",
        "ssm_state_size": "d_state",
        "n_groups": "n_state_groups",
        "conv_kernel": "d_conv",
        "use_conv_bias": "conv_bias",
        "use_bias": "proj_bias",
        "time_step_min": "dt_floor",
    }
    whole = whole_fields(m, "layer_norm_epsilon")
    return {
        **{k: v for k, v in whole.items() if k != "hidden_act"},
        **heads_alone(m),
        "num_hidden_layers": len(parts),
        **{theirs: state.get(ours) for theirs, ours in names.items()},
        **expert_fields(m, "n_routed_experts", "moe_intermediate_size", PER_TOKEN),
        **scaled_weights(m),
        "layers_block_type": [words.get(kind, kind) for kind in parts],
        "moe_shared_expert_intermediate_size": m.experts.get("d_shared"),
        "intermediate_size": m.dense.get("d_ff"),
    }


def _kimi(m: Layers) -> Plain:
    """Write Kimi delta attention, latent attention and experts beside shared ones."""
    delta, scaled = m.first("mixer", "kimi_delta"), scaled_weights(m)
    return {
        **whole_fields(m),
        **latent_fields(m),
        **expert_fields(m, "num_experts", "moe_intermediate_size", "num_experts_per_token"),
        "linear_head_dim": delta.get("key_dim"),
        "linear_num_heads": delta.get("n_heads"),
        "linear_conv_kernel_dim": delta.get("d_conv"),
        "layer_types": [
            "linear_attention" if kind == "kimi_delta" else "full_attention" for kind in kinds(m)
        ],
        "moe_renormalize": scaled["norm_topk_prob"],
        "routed_scaling_factor": scaled["routed_scaling_factor"],
        "num_expert_group": scaled["n_group"],
        "topk_group": scaled["topk_group"],
        "num_shared_experts": shared_experts(m),
        "intermediate_size": m.dense.get("d_ff"),
        "mlp_layer_types": layer_words(m),
    }


def kimi_linear(m: Layers) -> Plain:
    """Kimi Linear: its latent attention has no positions."""
    return {k: v for k, v in _kimi(m).items() if not k.startswith("rope")}


def bailing_hybrid(m: Layers) -> Plain:
    """Ling hybrid: bounded decays; its latent attention has gates, and queries of one matrix."""
    limit = m.first("mixer", "kimi_delta").get("decay_limit")
    fields = {k: v for k, v in _kimi(m).items() if k != "q_lora_rank"}
    return {**fields, "kda_lower_bound": None if limit is None else -limit}
