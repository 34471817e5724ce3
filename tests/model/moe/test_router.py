"""Each router against its formula, written out token by token; what balancing adds to it."""

from __future__ import annotations

import math

import pytest
import torch
from routers import router_of
from torch import Tensor

from moenas.grammar import tree
from moenas.model import Gating, LoadBalancer, Router, RoutingDecision

D_MODEL, N_EXPERTS, TOKENS = 16, 6, 40


def build(router: Router, seed: int = 0) -> Gating:
    module = router.build(D_MODEL, N_EXPERTS)
    module.logits.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
    return module


def some_tokens(seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))


def written_out(router: Router, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token."""
    if router.score.kind == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        scores = [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
    ranks = sorted(range(len(logits)), key=lambda e: scores[e] + bias[e], reverse=True)
    chosen = {e: scores[e] for e in ranks[: router.top_k]}
    whole = sum(chosen.values()) if router.normalizes else 1.0
    return {e: router.scale * score / whole for e, score in chosen.items()}


@pytest.mark.parametrize(
    "router",
    [
        router_of(top_k=2),
        router_of(top_k=1, normalize=False),
        router_of(top_k=3, normalize=False, scale=2.0),
        router_of(top_k=2, score="sigmoid", scale=2.5),
        router_of(top_k=N_EXPERTS, score="sigmoid", normalize=False),
    ],
    ids=["mixtral", "switch", "raw", "deepseek", "all"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_and_weights_follow_the_formula(router: Router, biased: bool) -> None:
    module, x = build(router), some_tokens()
    bias = torch.linspace(-0.4, 0.4, N_EXPERTS) if biased else None
    choice = module(x, bias)
    logits = (x.double() @ module.logits.weight.double().T).tolist()
    for token in range(TOKENS):
        want = written_out(router, logits[token], bias.tolist() if biased else [0.0] * N_EXPERTS)
        chosen = dict(
            zip(choice.experts[token].tolist(), choice.weights[token].tolist(), strict=True)
        )
        assert chosen == pytest.approx(want, abs=1e-5)


def test_normalised_softmax_is_the_softmax_over_the_chosen() -> None:
    choice = build(router_of(top_k=2))(some_tokens())
    over_chosen = choice.logits.gather(-1, choice.experts).softmax(dim=-1)
    torch.testing.assert_close(choice.weights, over_chosen)


def test_the_bias_moves_the_selection_and_never_the_weights() -> None:
    module, x = build(router_of(top_k=1, score="sigmoid", normalize=False)), some_tokens()
    favoured = torch.tensor([10.0, 0, 0, 0, 0, 0])
    choice = module(x, favoured)
    assert (choice.experts == 0).all()
    torch.testing.assert_close(choice.weights[:, 0], choice.scores[:, 0])


def test_logits_are_float32_whatever_the_tokens_are() -> None:
    choice = build(Router())(some_tokens().bfloat16())
    assert {choice.logits.dtype, choice.weights.dtype} == {torch.float32}


def choice_of(experts: list[list[int]], logits: Tensor, score: str) -> RoutingDecision:
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    chosen = torch.tensor(experts)
    return RoutingDecision(chosen, scores.gather(-1, chosen), scores, logits)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_follow_the_formulas(score: str) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    experts = [[0, 1], [0, 2], [0, 1], [1, 2]]
    balance = LoadBalancer(3, aux_coef=0.5, z_coef=0.25)
    routing = balance(choice_of(experts, logits, score), torch.zeros(()))
    assert routing.load.tolist() == [3, 3, 2]
    aux = z = 0.0
    for i in range(3):
        share = sum(row.count(i) for row in experts) / 8
        mean = 0.0
        for row in logits.tolist():
            s = [1 / (1 + math.exp(-x)) if score == "sigmoid" else math.exp(x) for x in row]
            mean += s[i] / sum(s) / 4
        aux += 3 * share * mean
    for row in logits.tolist():
        z += math.log(sum(math.exp(x) for x in row)) ** 2 / 4
    assert routing.balance_loss.item() == pytest.approx(aux, abs=1e-6)
    assert routing.z_loss.item() == pytest.approx(z, abs=1e-6)
    total = balance.auxiliary_loss(routing).item()
    assert total == pytest.approx(0.5 * aux + 0.25 * z, abs=1e-6)


def test_an_even_load_has_balance_loss_1_and_an_uneven_one_more() -> None:
    balance = LoadBalancer(2, aux_coef=1.0)
    even = balance(
        choice_of([[0], [1]], torch.tensor([[9.0, 0], [0, 9]]), "softmax"), torch.zeros(())
    )
    assert even.balance_loss.item() == pytest.approx(1)
    all_to_one = torch.tensor([[9.0, 0], [9, 0]])
    uneven = balance(choice_of([[0], [0]], all_to_one, "softmax"), torch.zeros(()))
    assert uneven.balance_loss.item() == pytest.approx(2, abs=1e-3)


def test_the_selection_bias_lifts_the_idle_and_lowers_the_busy() -> None:
    balance = LoadBalancer(3, bias_rate=0.25)
    choice = choice_of([[0], [0], [0], [0], [1], [1]], torch.zeros(6, 3), "sigmoid")
    balance(choice, torch.zeros(()))
    balance.step()
    assert balance.bias is not None
    assert balance.bias.tolist() == [-0.25, 0, 0.25]


def test_an_evaluation_before_the_step_does_not_count() -> None:
    balance = LoadBalancer(3, bias_rate=0.25)
    balance(choice_of([[0], [0], [1]], torch.zeros(3, 3), "sigmoid"), torch.zeros(()))
    balance.eval()
    balance(choice_of([[2], [2], [1]], torch.zeros(3, 3), "sigmoid"), torch.zeros(()))
    for _ in range(2):  # the second has no training pass before it
        balance.step()
        assert balance.bias.tolist() == [-0.25, 0, 0.25]


def test_the_bias_evens_out_a_router_that_has_a_favourite() -> None:
    router = router_of(score="sigmoid", top_k=1, balance={"kind": "bias", "rate": 0.01})
    module, balance, x = build(router), router.build_balancer(N_EXPERTS), some_tokens()
    x[:, 0] = 1.0
    module.logits.weight.data[0, 0] = 4.0
    busiest = []
    for _ in range(150):
        routing = balance(module(x, balance.bias), torch.zeros(()))
        busiest.append(routing.load.max().item() / TOKENS)
        balance.step()
    assert busiest[0] > 0.6
    assert busiest[-1] < 0.3


@pytest.mark.parametrize("preset", Router.presets)
def test_presets_are_valid_spellings(preset: str) -> None:
    router = tree.parse(Router, {"preset": preset})
    assert router == tree.parse(Router, Router.presets[preset])
    known = router.plain()
    for name, value in Router.presets[preset].items():
        if isinstance(known[name], dict):
            value = {"kind": value} if isinstance(value, str) else value
            assert known[name] == known[name] | value
        else:
            assert known[name] == value
    assert tree.parse(Router, router.plain()) == router


ALIKE = [
    # A single weight is not divided by itself.
    (router_of(top_k=1), router_of(top_k=1, normalize=False)),
    (router_of(top_k=2), router_of(top_k=2, normalize=True)),
    # A balance without any force.
    (router_of(balance={"kind": "aux_loss", "coef": 0.0}), router_of(balance="none")),
    (router_of(balance={"kind": "bias", "rate": 0.0}), router_of(balance="none")),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_spellings_of_one_router_have_one_form(one: Router, other: Router) -> None:
    assert one != other
    assert one.canonical() == other.canonical()
    assert one.canonical().canonical() == one.canonical()


def test_different_routers_keep_different_forms() -> None:
    routers = [
        Router(),
        router_of(normalize=False),
        router_of(score="sigmoid"),
        router_of(top_k=1),
        router_of(top_k=1, score="sigmoid"),
        router_of(scale=2.0),
        router_of(balance={"kind": "aux_loss", "coef": 0.02}),
        router_of(z_coef=0.001),
        router_of(capacity_factor=1.0),
        router_of(balance="bias"),
        router_of(balance={"kind": "bias", "rate": 0.01}),
        router_of(balance="none"),
    ]
    assert len({router.canonical() for router in routers}) == len(routers)


def test_among_as_many_experts_as_are_chosen_nothing_is_left_to_balance() -> None:
    router = router_of(top_k=4, normalize=False, balance="bias", capacity_factor=1.0)
    assert router.canonical_among(4) == router_of(top_k=4, balance="none", normalize=True)
    assert router.canonical_among(8) == router


def test_a_capacity_that_never_binds_is_none() -> None:
    assert router_of(top_k=2, capacity_factor=4.0).canonical_among(8).capacity_factor is None
    assert router_of(top_k=2, capacity_factor=3.9).canonical_among(8).capacity_factor == 3.9
