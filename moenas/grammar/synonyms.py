"""Names of other libraries and papers, and their names in a space file."""

from __future__ import annotations

from collections.abc import Iterable

from moenas.errors import suggestion

SYNONYMS: dict[str, str] = {
    # Mixers, by the names of papers and of Hugging Face layer types.
    "mla": "latent_attention",
    "multi_head_latent_attention": "latent_attention",
    "mha": "attention",
    "gqa": "attention with n_kv_heads",
    "mqa": "attention with n_kv_heads: 1",
    "self_attention": "attention",
    "full_attention": "attention",
    "sliding_attention": "attention with window",
    "sliding_window_attention": "attention with window",
    "swa": "attention with window",
    "chunked_attention": "attention with chunk",
    "nope": "attention with rope.partial_rotary_factor: 0",
    "linear_attention": "gated_delta",
    "gated_deltanet": "gated_delta",
    "gated_delta_net": "gated_delta",
    "gdn": "gated_delta",
    "deltanet": "gated_delta",
    "kda": "kimi_delta",
    "kimi_delta_attention": "kimi_delta",
    "lightning": "lightning_attention",
    "mamba_2": "mamba2",
    "mamba_1": "mamba",
    "mamba1": "mamba",
    "ssm": "mamba2",
    "ssd": "mamba2",
    "conv": "short_conv",
    "shortconv": "short_conv",
    "mixture_of_attention": "moa",
    # Feed-forward layers.
    "mlp": "dense",
    "ffn": "dense",
    "feed_forward": "dense",
    "swiglu": "dense with activation: swiglu",
    "geglu": "dense with activation: geglu",
    "glu": "dense with activation: glu",
    "gelu": "dense with activation: gelu",
    "relu": "dense with activation: relu",
    "mixture_of_experts": "moe",
    "sparse": "moe",
    "peer": "product_key",
    "pkm": "product_key",
    # Fields of Hugging Face configurations.
    "hidden_size": "d_model",
    "n_embd": "d_model",
    "num_hidden_layers": "blocks.repeat",
    "num_layers": "blocks.repeat",
    "n_layers": "blocks.repeat",
    "n_layer": "blocks.repeat",
    "intermediate_size": "ffn.d_ff",
    "ffn_dim": "ffn.d_ff",
    "moe_intermediate_size": "ffn.d_expert",
    "expert_hidden_size": "ffn.d_expert",
    "shared_expert_intermediate_size": "ffn.d_shared",
    "moe_shared_expert_intermediate_size": "ffn.d_shared",
    "num_experts": "ffn.n_experts",
    "num_local_experts": "ffn.n_experts",
    "n_routed_experts": "ffn.n_experts",
    "moe_num_experts": "ffn.n_experts",
    "num_shared_experts": "ffn.n_shared_experts",
    "moe_num_shared_experts": "ffn.n_shared_experts",
    "zero_expert_num": "ffn.n_zero_experts",
    "num_attention_heads": "mixer.n_heads",
    "n_head": "mixer.n_heads",
    "num_heads": "mixer.n_heads",
    "num_key_value_heads": "mixer.n_kv_heads",
    "num_kv_heads": "mixer.n_kv_heads",
    "sliding_window": "mixer.window",
    "attention_chunk_size": "mixer.chunk",
    "attn_logit_softcapping": "mixer.softcap",
    "attention_bias": "mixer.qkv_bias",
    "use_qk_norm": "mixer.qk_norm",
    "clip_qkv": "mixer.qkv_clip",
    "partial_rotary_factor": "mixer.rope.partial_rotary_factor",
    "kv_lora_rank": "mixer.kv_rank",
    "q_lora_rank": "mixer.q_rank",
    "qk_nope_head_dim": "mixer.nope_dim",
    "qk_rope_head_dim": "mixer.rope_dim",
    "mamba_d_state": "mixer.d_state",
    "ssm_state_size": "mixer.d_state",
    "conv_kernel": "mixer.d_conv",
    "mscale": "mixer.rope.scaling.attention_factor",
    "mscale_all_dim": "mixer.scale",
    "dynamic": "linear",
    "longrope": "yarn",
    "num_experts_per_tok": "router.top_k",
    "num_experts_per_token": "router.top_k",
    "num_selected_experts": "router.top_k",
    "moe_top_k": "router.top_k",
    "moe_topk": "router.top_k",
    "moe_k": "router.top_k",
    "n_group": "router.selection.n_groups",
    "topk_group": "router.selection.top_groups",
    "norm_topk_prob": "router.normalize",
    "routed_scaling_factor": "router.scale",
    "moe_router_scaling_factor": "router.scale",
    "scoring_func": "router.score",
    "topk_method": "router.selection",
    "router_aux_loss_coef": "router.balance.coef",
    "aux_loss_alpha": "router.balance.coef",
    "router_z_loss_coef": "router.z_coef",
    "router_jitter_noise": "router.logits.jitter",
    "bias_update_speed": "router.balance.rate",
    "hidden_act": "ffn.activation",
    "hidden_activation": "ffn.activation",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "rms_norm": "rmsnorm",
    "layer_norm": "layernorm",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
    "final_logit_softcapping": "logit_softcap",
    "lm_head_bias": "head_bias",
    "n_vocab": "vocab_size",
    "expert_choice_routing": "expert_choice",
}
"""Word -> the word of a space file: a field with the components that hold it, a kind, or a value.
Fields beside a kind follow `with`."""


def hint(word: str, known: Iterable[str]) -> str:
    """Return what a space file calls a word, as a sentence, or an empty string.

    `known` are the words that this place accepts. A synonym counts before the nearest spelling. If
    it belongs elsewhere, the sentence names the component that holds it.
    """
    words = [str(name) for name in known]
    head, _, beside = SYNONYMS.get(str(word).lower().replace("-", "_"), "").partition(" with ")
    path = head.split(".")
    here = [i for i in reversed(range(len(path))) if path[i] in words]
    if here:
        rest = f" with {beside}" if beside else ""
        return f" Did you mean '{'.'.join(path[here[0] :])}'{rest}?"
    if (near := suggestion(word, words)) and not head:
        return near
    return f" A space file writes it as '{head}'." if head else ""
