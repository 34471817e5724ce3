"""Gates on the output of attention heads: the formula, element by element, and the cost."""

from __future__ import annotations

import math

import pytest
import torch

from moenas.model import AttentionMixer
from moenas.model.architecture import Architecture

HEADS, WIDTH, D_MODEL = 2, 8, 16


@pytest.mark.parametrize("gated_by", ["head", "element"])
@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_a_gate_multiplies_the_output_of_its_head(
    gated_by: str, activation: str, biased: bool
) -> None:
    mixer = AttentionMixer(
        head_dim=WIDTH, output_gate=gated_by, gate_activation=activation, gate_bias=biased
    )
    gate = mixer.build(D_MODEL).gate
    generator = torch.Generator().manual_seed(1)
    for parameter in gate.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(1, 1, D_MODEL, generator=generator)
    y = torch.randn(1, 1, HEADS, WIDTH, generator=generator)
    gated = gate.gated(x, y)
    for head in range(HEADS):
        for element in range(WIDTH):
            row = head * WIDTH + element if gated_by == "element" else head
            z = float(gate.weight[row] @ x[0, 0]) + (float(gate.head_bias[head]) if biased else 0)
            factor = math.log1p(math.exp(z)) if activation == "softplus" else 1 / (1 + math.exp(-z))
            assert float(gated[0, 0, head, element]) == pytest.approx(
                factor * float(y[0, 0, head, element]), rel=1e-4, abs=1e-6
            )


def test_a_bias_of_the_gate_is_a_parameter_of_each_head() -> None:
    costs = [
        AttentionMixer(head_dim=8, output_gate="element", gate_bias=bias).cost(D_MODEL, 64)
        for bias in (False, True)
    ]
    assert costs[1].params - costs[0].params == HEADS
    assert costs[1].flops_per_token == costs[0].flops_per_token


def test_a_sigmoid_gate_keeps_the_plain_form_and_the_fingerprint() -> None:
    """The fingerprint is the same as in the version before there was another gate."""
    plain = {
        "vocab_size": 64,
        "d_model": 16,
        "blocks": [{"mixer": {"kind": "attention", "head_dim": 8, "output_gate": "head"}}],
    }
    assert Architecture.parse(plain).fingerprint == "9787b37e677ab64c"
