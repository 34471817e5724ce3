"""A step of two layers of each kind of mixer at 16k tokens: its time and its memory."""

from __future__ import annotations

from typing import Any

import torch

from gpu.card import DEVICE, milliseconds, peak_gib, release, seconds, sized
from gpu.models import tokens
from gpu.report import Report
from moenas.model.architecture import Architecture

D_MODEL = 512


def kinds(d: int) -> dict[str, dict[str, Any]]:
    """Return the mixers of a model of width d, by name."""
    heads = d // 64
    attention = {"kind": "attention", "head_dim": 64}
    few = {**attention, "n_kv_heads": max(1, heads // 4)}
    keys = {"n_heads": heads, "key_dim": 64, "value_dim": 64}
    latent = {"n_heads": heads, "kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "v_dim": 64}
    moa = {"n_experts": 8, "head_dim": 64, "n_kv_heads": 2, "router": {"top_k": 2}}
    return {
        "attention": few,
        "window": {**few, "window": 128},
        "sinks": {**few, "sinks": True, "window": 128},
        "softcap": {**attention, "softcap": 30.0},
        "alibi": {**attention, "position_bias": {"kind": "alibi"}},
        "t5": {**attention, "position_bias": {"kind": "t5"}},
        "latent attention": {"kind": "latent_attention", **latent},
        "mixture of attention": {"kind": "moa", **moa},
        "short convolution": {"kind": "short_conv"},
        "lightning attention": {"kind": "lightning_attention", "n_heads": heads, "head_dim": 64},
        "mamba2": {"kind": "mamba2", "n_heads": d // 32, "head_dim": 64, "d_state": 64},
        "gated delta": {"kind": "gated_delta", **keys},
        "kimi delta": {"kind": "kimi_delta", **keys, "rank": 32},
        "mamba": {"kind": "mamba", "d_inner": 2 * d},
    }


def measure(report: Report) -> None:
    """Measure each kind; the costliest come last."""
    d = sized(D_MODEL, 64)
    text = tokens(16, 1024)
    for name, mixer in kinds(d).items():
        with report.part(name):
            block = {"repeat": 2, "mixer": mixer}
            plain = {"vocab_size": 256, "d_model": d, "blocks": [block]}
            model = Architecture.parse(plain).build(DEVICE).train()

            def step(model: Any = model) -> None:
                model.zero_grad(set_to_none=True)
                (model.loss(text, text, torch.bfloat16) + model.auxiliary_loss()).backward()

            peak_gib()
            first, _ = seconds(step)
            took = milliseconds(step, 5, 2)
            report.figure(name, took, "ms", f"first step {1e3 * first:.0f} ms")
            report.figure(f"{name}: peak", peak_gib(), "GiB")
            del model, step
        release()
