"""Quantile balancing: its formula, the even assignment that it comes to, and where it acts."""

from __future__ import annotations

import pytest
import torch
from routers import router_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moenas.model.architecture import Architecture
from moenas.model.moe.balance import quantile_bias
from moenas.records import Plain

QUANTILE: Plain = {"balance": "quantile"}


def ranks_of(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    """Ranks with favourites among the experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator)
    return (logits + torch.linspace(2, -2, n_experts)).sigmoid()


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(12, 4, 1), (13, 5, 2), (40, 8, 7)])
def test_the_bias_is_that_of_sorted_lists(n_tokens: int, n_experts: int, top_k: int) -> None:
    """Steps 2 and 3 of the practical form, in plain Python; beta is the negative bias."""
    ranks = ranks_of(n_tokens, n_experts)
    bias = torch.linspace(-0.2, 0.2, n_experts)
    s, beta = ranks.tolist(), (-bias).tolist()
    alpha = [sorted((row[j] - beta[j] for j in range(n_experts)), reverse=True)[top_k] for row in s]
    place = n_tokens * top_k // n_experts
    wanted = [
        sorted((s[i][j] - alpha[i] for i in range(n_tokens)), reverse=True)[place]
        for j in range(n_experts)
    ]
    assert (-quantile_bias(ranks, bias, top_k)).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_assignment_comes_to_the_best_even_one(top_k: int) -> None:
    """Nearly the optimum of scipy: descent by one group of numbers at a time can stop at a tie."""
    n_tokens, n_experts = 240, 8
    ranks, bias = ranks_of(n_tokens, n_experts, 3), torch.zeros(n_experts)
    even = n_tokens * top_k // n_experts

    def largest_excess() -> float:
        chosen = (ranks + bias).topk(top_k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=n_experts)
        return float((load - even).abs().max()) / even

    assert largest_excess() > 1
    for _ in range(60):
        bias = quantile_bias(ranks, bias, top_k)
    assert largest_excess() < 0.15
    chosen = (ranks + bias).topk(top_k, dim=-1).indices
    if top_k == 1:
        seats = ranks.repeat_interleave(even, dim=1).numpy()  # a column for each place
        rows, columns = linear_sum_assignment(seats, maximize=True)
        best = float(seats[rows, columns].sum())
        assert float(ranks.gather(1, chosen).sum()) == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize("bias_on", ["score", "logits"])
def test_a_layer_moves_its_bias_after_a_step_alone(bias_on: str) -> None:
    """The batch that sets a bias is routed by the bias before it."""
    router = {"top_k": 1, "score": "sigmoid", "bias_on": bias_on, **QUANTILE}
    ffn: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8, "router": router}
    one = Architecture.parse({"vocab_size": 40, "d_model": 16, "blocks": [{"ffn": ffn}]})
    model = one.build(seed=1).train()
    ((_, moe),) = model.moe_layers()
    text = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))
    loads = []
    for _ in range(3):
        before = moe.balance.bias.clone()
        model.loss(text, text)
        assert torch.equal(moe.balance.bias, before)
        loads.append(moe.routing.load)
        choice = moe.routing.choice
        ranks = (choice.logits if bias_on == "logits" else choice.scores).detach().clone()
        model.eval()
        model(text[:1])  # a pass in evaluation counts for nothing
        model.train()
        model.after_step()
        assert torch.equal(moe.balance.bias, quantile_bias(ranks, before, 1))
    assert loads[-1].max() - loads[-1].min() < loads[0].max() - loads[0].min()
    held = moe.balance.bias.clone()
    model.after_step()
    assert torch.equal(moe.balance.bias, held)


def test_it_is_a_balancing_of_its_own_where_it_acts() -> None:
    quantile = router_of(top_k=2, balance="quantile")
    assert quantile.canonical() == quantile.canonical().canonical()
    assert quantile.canonical() != router_of(top_k=2, balance="bias").canonical()
    assert quantile.canonical().balance.kind == "quantile"
    assert quantile.canonical_among(2).balance.kind == "none"
    threshold = router_of(top_k=2, selection="threshold", balance="quantile")
    assert threshold.canonical().balance.kind == "none"
    pooled = router_of(top_k=2, balance="quantile", loss_reduce="pooled")
    assert pooled.canonical() == quantile.canonical()
