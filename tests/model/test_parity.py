"""Mixers against mixers of transformers: their random weights, loaded into ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moenas.model import (
    AttentionMixer,
    GatedDeltaMixer,
    LatentAttentionMixer,
    Mamba2Mixer,
    MambaMixer,
    Mixer,
    Rope,
    ShortConvMixer,
)

transformers = pytest.importorskip("transformers")

D_MODEL, LENGTH = 32, 70


def randomised(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return dict(module.state_dict())


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(9))


def ours(mixer: Mixer, weights: dict[str, Tensor]) -> nn.Module:
    module = mixer.build(D_MODEL)
    module.load_state_dict(weights)
    return module.eval()


def agree(module: nn.Module, wanted: Tensor, x: Tensor) -> None:
    """At once, and through a cache."""
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
    cache = module.new_cache(len(x), x.shape[1])  # type: ignore[operator]
    joined = torch.cat([module(piece, cache) for piece in x.split([40, 1, x.shape[1] - 41], 1)], 1)
    torch.testing.assert_close(joined, wanted, rtol=1e-4, atol=1e-5)


def causal(length: int, window: int | None = None) -> Tensor:
    """The additive mask that their eager attention takes."""
    query, key = torch.arange(length).unsqueeze(-1), torch.arange(length)
    seen = (key <= query) & (key > query - (window or length))
    return torch.zeros(length, length).masked_fill(~seen, -torch.inf).expand(2, 1, -1, -1)


def interleaved_to_halves(width: int) -> Tensor:
    """Order that moves pairs (0, 1), (2, 3), ... to (0, W/2), (1, W/2 + 1), ..."""
    return torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))


@torch.no_grad()
def test_attention_with_sinks_window_and_biases_is_that_of_gpt_oss() -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    config = transformers.GptOssConfig(
        hidden_size=D_MODEL,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=9,
        layer_types=["sliding_attention"],
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    attention, x = theirs.GptOssAttention(config, 0).eval(), tokens()
    w = randomised(attention)
    angles = theirs.GptOssRotaryEmbedding(config)(x, torch.arange(LENGTH).expand(2, -1))
    wanted = attention(x, angles, causal(LENGTH, 9))[0]
    mixer = AttentionMixer(
        head_dim=16,
        n_heads=4,
        n_kv_heads=2,
        rope=Rope(theta=500.0),
        window=9,
        sinks=True,
        qkv_bias=True,
        out_bias=True,
    )
    weights = {
        f"qkv.{end}": torch.cat([w[f"{p}_proj.{end}"] for p in "qkv"]) for end in ("weight", "bias")
    }
    weights |= {f"out.{end}": w[f"o_proj.{end}"] for end in ("weight", "bias")}
    agree(ours(mixer, weights | {"attend.sinks": w["sinks"]}), wanted, x)


@torch.no_grad()
@pytest.mark.parametrize("q_rank", [None, 12])
def test_latent_attention_is_that_of_deepseek_v3(q_rank: int | None) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    heads, nope, rope, value, rank = 3, 8, 4, 16, 10
    config = transformers.DeepseekV3Config(
        hidden_size=D_MODEL,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    attention, x = theirs.DeepseekV3Attention(config, 0).eval(), tokens()
    w = randomised(attention)
    angles = theirs.DeepseekV3RotaryEmbedding(config)(x, torch.arange(LENGTH).expand(2, -1))
    wanted = attention(x, angles, causal(LENGTH))[0]
    order = interleaved_to_halves(rope)
    q = w["q_proj.weight" if q_rank is None else "q_b_proj.weight"].view(heads, nope + rope, -1)
    q = torch.cat((q[:, :nope], q[:, nope:][:, order]), dim=1).flatten(0, 1)
    down = w["kv_a_proj_with_mqa.weight"]
    weights = {
        "keys.down.weight": torch.cat((down[:rank], down[rank:][order])),
        "keys.norm.weight": w["kv_a_layernorm.weight"],
        "keys.up.weight": w["kv_b_proj.weight"],
        "out.weight": w["o_proj.weight"],
    }
    if q_rank is None:
        weights["query.weight"] = q
    else:
        weights |= {"query.down.weight": w["q_a_proj.weight"], "query.up.weight": q}
        weights["query.norm.weight"] = w["q_a_layernorm.weight"]
    mixer = LatentAttentionMixer(
        n_heads=heads,
        q_rank=q_rank,
        kv_rank=rank,
        nope_dim=nope,
        rope_dim=rope,
        v_dim=value,
        rope=Rope(theta=500.0),
    )
    agree(ours(mixer, weights), wanted, x)


@torch.no_grad()
def test_mamba2_is_that_of_nemotron_h() -> None:
    from transformers.models.nemotron_h import modeling_nemotron_h as theirs

    config = transformers.NemotronHConfig(
        hidden_size=D_MODEL,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=6,
        n_groups=2,
        conv_kernel=4,
        chunk_size=16,
        layer_types=["mamba"],
        layer_norm_epsilon=1e-5,
    )
    mamba, x = theirs.NemotronHMamba2Mixer(config, 0).eval(), tokens()
    w = randomised(mamba)
    mixer = Mamba2Mixer(
        n_heads=4, head_dim=8, d_state=6, n_state_groups=2, dt_floor=config.time_step_min
    )
    weights = {
        "project.weight": w["in_proj.weight"],
        "convolution.weight": w["conv1d.weight"].squeeze(1),
        "convolution.bias": w["conv1d.bias"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
        "skip": w["D"],
    }
    agree(ours(mixer, weights), mamba(x), x)


@torch.no_grad()
def test_mamba_is_that_of_jamba() -> None:
    from transformers.models.jamba import modeling_jamba as theirs

    config = transformers.JambaConfig(
        hidden_size=D_MODEL,
        mamba_d_state=6,
        mamba_expand=2,
        mamba_dt_rank=3,
        num_hidden_layers=1,
        use_mamba_kernels=False,
    )
    mamba, x = theirs.JambaMambaMixer(config, 0).eval(), tokens()
    w = randomised(mamba)
    mixer = MambaMixer(d_inner=64, d_state=6, dt_rank=3, inner_norm=True)
    weights = {
        "project.weight": w["in_proj.weight"],
        "convolution.weight": w["conv1d.weight"].squeeze(1),
        "convolution.bias": w["conv1d.bias"],
        "choose.project.weight": w["x_proj.weight"],
        "choose.dt.weight": w["dt_proj.weight"],
        "choose.dt_bias": w["dt_proj.bias"],
        "choose.norms.0.weight": w["dt_layernorm.weight"],
        "choose.norms.1.weight": w["b_layernorm.weight"],
        "choose.norms.2.weight": w["c_layernorm.weight"],
        "out.weight": w["out_proj.weight"],
        "log_rate": w["A_log"],
        "skip": w["D"],
    }
    agree(ours(mixer, weights), mamba(x), x)


@torch.no_grad()
def test_the_gated_delta_rule_is_that_of_qwen3_next() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    keys, values, key, value = 2, 4, 8, 16
    config = transformers.Qwen3NextConfig(
        hidden_size=D_MODEL,
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    rule, x = theirs.Qwen3NextGatedDeltaNet(config, 0).eval(), tokens()
    w = randomised(rule)
    each = values // keys
    mixed = w["in_proj_qkvz.weight"].view(keys, -1, D_MODEL)
    parts = mixed.split([key, key, each * value, each * value], dim=1)
    chosen = w["in_proj_ba.weight"].view(keys, -1, D_MODEL).split([each, each], dim=1)
    weights = {
        "project.weight": torch.cat([p.flatten(0, 1) for p in (*parts, *chosen)]),
        "convolution.weight": w["conv1d.weight"].squeeze(1),
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
        "log_rate": w["A_log"],
        "dt_bias": w["dt_bias"],
    }
    mixer = GatedDeltaMixer(n_heads=values, n_key_heads=keys, key_dim=key, value_dim=value)
    agree(ours(mixer, weights), rule(x), x)


@torch.no_grad()
def test_the_short_convolution_is_that_of_lfm2() -> None:
    from transformers.models.lfm2 import modeling_lfm2 as theirs

    config = transformers.Lfm2Config(
        hidden_size=D_MODEL,
        conv_L_cache=3,
        conv_bias=True,
        num_hidden_layers=1,
        layer_types=["conv"],
    )
    convolution: Any = theirs.Lfm2ShortConv(config, 0).eval()
    x, w = tokens(), randomised(convolution)
    weights = {f"project.{end}": w[f"in_proj.{end}"] for end in ("weight", "bias")}
    weights |= {f"out.{end}": w[f"out_proj.{end}"] for end in ("weight", "bias")}
    weights["convolution.weight"] = w["conv.weight"].squeeze(1)
    weights["convolution.bias"] = w["conv.bias"]
    agree(ours(ShortConvMixer(bias=True), weights), convolution(x), x)
