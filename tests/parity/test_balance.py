"""The balancing loss of whole models, and its gradient, against that of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from families import MIXTRAL, QWEN3_MOE, SIZES, Family
from test_models import ours_of, randomise, theirs_of, tokens
from weights import rows_of, to_ours

from moenas.model.architecture import Architecture, Model

FAMILIES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
ROUTER = "ffn.router.logits.weight"


def pair(family: Family) -> tuple[Model, Any]:
    """Return a model of ours and theirs with the same weights."""
    ours, theirs = ours_of(family), theirs_of(family)
    state = dict(theirs.state_dict())
    randomise(state, 1)
    rows = rows_of(family.table, state, len(ours.blocks))
    ours.load_state_dict(to_ours(rows, state))
    return ours.train(), theirs.train()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_two_layers_and_its_gradient_agree(name: str) -> None:
    ours, theirs = pair(FAMILIES[name])
    (_, first), _ = ours.moe_layers()
    ours.loss(tokens(), tokens())
    loss = ours.auxiliary_loss()
    loss.backward()
    given = theirs(tokens(), output_router_logits=True)
    config = theirs.config
    n_experts = config.num_local_experts if name == "mixtral" else config.num_experts
    assert given.aux_loss > config.num_experts_per_tok  # the load is not even
    (first.balance.aux_coef * given.aux_loss).backward()
    torch.testing.assert_close(loss, first.balance.aux_coef * given.aux_loss, rtol=1e-5, atol=0)
    gates = [(n, p) for n, p in theirs.named_parameters() if n.endswith("gate.weight")]
    assert len(gates) == 2
    weights = dict(ours.named_parameters())
    for i, (_, gate) in enumerate(gates):
        assert gate.grad.abs().max() > 0
        assert gate.shape[0] == n_experts
        scale = float(gate.grad.abs().max())
        ours_grad = weights[f"blocks.{i}.{ROUTER}"].grad
        torch.testing.assert_close(ours_grad, gate.grad, rtol=1e-4, atol=1e-5 * scale)


def test_the_presets_weigh_it_as_the_released_configurations() -> None:
    """Coefficients that Mixtral 8x7B, Qwen3-30B-A3B and gpt-oss were released with."""
    released = {"mixtral": 0.02, "qwen3_moe": 0.001, "gpt_oss": 0.9}
    for preset, coefficient in released.items():
        model = model_of({"preset": preset, "top_k": 2}, 3)
        model.loss(tokens(), tokens())
        logits = tuple(moe.routing.choice.logits for _, moe in model.moe_layers())
        wanted = coefficient * hf.models.mixtral.modeling_mixtral.load_balancing_loss_func(
            logits, 8, 2
        )
        torch.testing.assert_close(model.auxiliary_loss(), wanted, rtol=1e-6, atol=0)


def model_of(router: dict[str, Any], n_layers: int) -> Model:
    ffn = {"kind": "moe", "n_experts": 8, "d_expert": 8, "router": router}
    mixer = {"kind": "attention", "head_dim": 16}
    blocks = [{"repeat": n_layers, "mixer": mixer, "ffn": ffn}]
    parsed = Architecture.parse(
        {"vocab_size": SIZES["vocab_size"], "d_model": 32, "blocks": blocks}
    )
    model = parsed.build(seed=2)
    for name, weight in model.named_parameters():
        if name.endswith(ROUTER):
            weight.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def test_the_mean_over_layers_is_that_of_megablocks() -> None:
    """loss_weight E / (layers tokens top_k) sum over layers of tokens_per_expert . scores."""
    model = model_of({"preset": "olmoe", "top_k": 2, "z_coef": 0.0}, 3)
    model.loss(tokens(), tokens())
    wanted = 0.0
    for _, moe in model.moe_layers():
        scores = moe.routing.choice.scores.detach().double()
        counts = torch.bincount(moe.routing.choice.experts.flatten(), minlength=8)
        n = len(scores)
        wanted += 0.01 * 8 / (3 * n * 2) * float(counts.double() @ scores.mean(dim=0))
    assert model.auxiliary_loss().item() == pytest.approx(wanted, rel=1e-5)


def test_one_layer_is_the_same_loss_times_top_k() -> None:
    one = model_of(
        {"top_k": 2, "loss_reduce": "pooled", "balance": {"kind": "aux_loss", "coef": 0.01}}, 1
    )
    other = model_of(
        {"top_k": 2, "loss_reduce": "mean", "balance": {"kind": "aux_loss", "coef": 0.02}}, 1
    )
    for model in (one, other):
        model.loss(tokens(), tokens())
    torch.testing.assert_close(one.auxiliary_loss(), other.auxiliary_loss(), rtol=1e-6, atol=0)
