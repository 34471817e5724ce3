"""Scores, groups, noise and losses of routers, each against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from routers import router_of
from torch import Tensor

from moenas.model import Gating, LoadBalancer, Router, RoutingDecision

D_MODEL, N_EXPERTS, TOKENS = 16, 8, 40


def build(router: Router, seed: int = 0) -> Gating:
    module = router.build(D_MODEL, N_EXPERTS)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module


def some_tokens(seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))


def logits_of(module: Gating, x: Tensor) -> list[list[float]]:
    """z = W x + b, or W gelu(V x) + b, token by token."""
    front, rows = module.logits, []
    for token in x.double().tolist():
        if front.hidden is not None:
            rows_in = front.hidden.weight.tolist()
            inner = [sum(a * b for a, b in zip(row, token, strict=True)) for row in rows_in]
            token = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in inner]
        z = [sum(a * b for a, b in zip(row, token, strict=True)) for row in front.weight.tolist()]
        bias = [0.0] * N_EXPERTS if front.bias is None else front.bias.tolist()
        rows.append([a + b for a, b in zip(z, bias, strict=True)])
    return rows


def scores_of(name: str, z: list[float]) -> list[float]:
    if name == "softmax":
        return [math.exp(x) / sum(math.exp(y) for y in z) for x in z]
    one = {
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrt_softplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
        "relu": lambda x: max(x, 0.0),
    }[name]
    return [one(x) for x in z]


def written_out(router: Router, z: list[float], bias: list[float]) -> dict[int, float]:
    """Expert -> weight of one token, with groups as in the papers of DeepSeek-V2 and V3."""
    s = scores_of(router.score.kind, z)
    ranked = [a + b for a, b in zip(s, bias, strict=True)]
    size = N_EXPERTS // router.selection.n_groups
    groups = [ranked[i : i + size] for i in range(0, N_EXPERTS, size)]
    best = 1 if router.selection.group_score == "max" else 2
    of_group = [sum(sorted(g, reverse=True)[:best]) for g in groups]
    inside = sorted(range(router.selection.n_groups), key=lambda g: of_group[g], reverse=True)
    allowed = [e for e in range(N_EXPERTS) if e // size in inside[: router.selection.top_groups]]
    chosen = sorted(allowed, key=lambda e: ranked[e], reverse=True)[: router.top_k]
    whole = sum(s[e] for e in chosen) + 1e-20 if router.normalizes else 1.0
    return {e: router.scale * s[e] / whole for e in chosen}


ROUTERS = {
    "sqrt_softplus": router_of(score="sqrt_softplus", top_k=3),
    "relu": router_of(score="relu", top_k=3, normalize=False),
    "logit bias": router_of(top_k=4, logits={"kind": "linear", "add_bias": True}),
    "hidden": router_of(top_k=2, logits={"kind": "linear", "hidden": 8}, score="sigmoid"),
    "hidden with bias": router_of(
        top_k=2, logits={"kind": "linear", "hidden": 24, "add_bias": True}
    ),
    "v2 groups": router_of(
        top_k=4,
        normalize=False,
        scale=16.0,
        selection={"kind": "top_k", "n_groups": 4, "top_groups": 2},
    ),
    "v3 groups": router_of(
        top_k=3,
        score="sigmoid",
        scale=2.5,
        selection={"kind": "top_k", "n_groups": 4, "top_groups": 2, "group_score": "top2_sum"},
    ),
    "groups of one": router_of(
        top_k=2,
        selection={"kind": "top_k", "n_groups": 8, "top_groups": 2, "group_score": "top2_sum"},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_and_weights_follow_the_formula(name: str, biased: bool) -> None:
    router = ROUTERS[name]
    module, x = build(router), some_tokens()
    order = [3, 0, 6, 2, 7, 1, 5, 4]
    bias = torch.linspace(-0.3, 0.3, N_EXPERTS)[order] if biased else None
    choice = module(x, bias)
    flat = [0.0] * N_EXPERTS if bias is None else bias.tolist()
    for token, z in enumerate(logits_of(module, x)):
        chosen = zip(choice.experts[token].tolist(), choice.weights[token].tolist(), strict=True)
        chosen = {e: w for e, w in chosen if w or router.score.kind != "relu"}
        want = written_out(router, z, flat)
        want = {e: w for e, w in want.items() if w or router.score.kind != "relu"}
        assert chosen == pytest.approx(want, abs=1e-5)


def test_scores_of_far_logits_have_finite_gradients() -> None:
    for name in ("softmax", "sigmoid", "sqrt_softplus", "relu"):
        module = build(router_of(score=name))
        x = (some_tokens() * 300).requires_grad_()
        module(x).weights.square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all(), name


def test_noise_moves_the_choice_in_training_only() -> None:
    module, x = build(router_of(selection="noisy_top_k")), some_tokens()
    first, second = module(x), module(x)
    assert not torch.equal(first.experts, second.experts)
    # Mixtral's identity holds for the noisy logits, as in eq. 3 and 5 of arXiv 1701.06538.
    kept = first.logits.gather(-1, first.experts).softmax(-1)
    torch.testing.assert_close(first.weights, kept)
    module.eval()
    plain = build(Router())
    plain.logits.weight.data.copy_(module.logits.weight)
    torch.testing.assert_close(module(x).weights, plain(x).weights)
    assert module(x).chance is None


def test_noise_has_the_learned_spread() -> None:
    module = build(router_of(selection="noisy_top_k"))
    x = some_tokens()[:1].expand(4000, -1)
    choice = module(x)
    clean = x[0].double() @ module.logits.weight.double().T
    spread = (x[0].double() @ module.noise.weight.double().T).exp().log1p()
    torch.testing.assert_close(choice.logits.double().mean(0), clean, atol=0.1, rtol=0.05)
    torch.testing.assert_close(choice.logits.double().std(0), spread, atol=0.02, rtol=0.06)


def test_the_chance_of_an_expert_is_what_fresh_noise_for_it_gives() -> None:
    """Draw the noise of one expert again and again, the others' as they are (eq. 8)."""
    module, x = build(router_of(selection="noisy_top_k", top_k=2)), some_tokens()[:3]
    choice = module(x)
    assert choice.chance is not None
    clean = x @ module.logits.weight.T
    spread = torch.nn.functional.softplus(x @ module.noise.weight.T)
    for e in range(N_EXPERTS):
        again = choice.logits.detach().repeat(4000, 1, 1)
        again[..., e] = clean[:, e] + torch.randn(4000, 3) * spread[:, e]
        share = (again.topk(2, dim=-1).indices == e).any(-1).float().mean(0)
        torch.testing.assert_close(choice.chance[:, e], share, atol=0.04, rtol=0)


def test_jitter_scales_what_the_router_sees_in_training_only() -> None:
    module = build(router_of(logits={"kind": "linear", "jitter": 0.25}))
    x = torch.ones(2000, D_MODEL)
    module.logits.weight.data.zero_()
    module.logits.weight.data[0, 0] = 1.0
    factors = module.logits(x)[:, 0]
    assert 0.75 <= factors.min() < 0.77
    assert 1.23 < factors.max() <= 1.25
    assert (module.eval().logits(x)[:, 0] == 1).all()


def choice_of(experts: list[list[int]], logits: Tensor) -> RoutingDecision:
    chosen, scores = torch.tensor(experts), logits.softmax(-1)
    return RoutingDecision(chosen, scores.gather(-1, chosen), scores, logits)


def test_the_loss_of_a_sequence_is_its_own() -> None:
    """Two sequences of two tokens; DeepSeek-V3, eq. 17 to 20, written out."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    experts = [[0, 1], [0, 2], [0, 1], [1, 2]]
    balance = LoadBalancer(3, aux_coef=1.0, scope="sequence")
    loss = balance(choice_of(experts, logits), torch.zeros(()), 2).balance_loss.item()
    wanted = 0.0
    for start in (0, 2):
        for i in range(3):
            f = 3 / (2 * 2) * sum(row.count(i) for row in experts[start : start + 2])
            p = sum(scores_of("softmax", z)[i] for z in logits[start : start + 2].tolist()) / 2
            wanted += f * p / 2
    assert loss == pytest.approx(wanted, abs=1e-6)
    whole = LoadBalancer(3, aux_coef=1.0)(choice_of(experts, logits), torch.zeros(()), 2)
    assert abs(whole.balance_loss.item() - loss) > 1e-3
    assert whole.load.tolist() == [3, 3, 2]


def test_beside_a_bias_the_loss_counts_the_best_scores_without_it() -> None:
    """DeepSeek-V3, eq. 17 to 20: f counts the K best of s itself, wherever the tokens went."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    scores = logits.sigmoid()
    sent = torch.tensor([[0, 1]] * 6)
    choice = RoutingDecision(sent, scores.gather(-1, sent), scores, logits)
    balance = LoadBalancer(4, aux_coef=1.0, scope="sequence", bias_rate=0.001)
    routing = balance(choice, torch.zeros(()), 2)
    wanted = 0.0
    for rows in (scores[:3].tolist(), scores[3:].tolist()):
        best = [sorted(range(4), key=lambda e: row[e], reverse=True)[:2] for row in rows]
        for i in range(4):
            f = 4 / (2 * 3) * sum(i in chosen for chosen in best)
            wanted += f * sum(row[i] / sum(row) for row in rows) / 3 / 2
    assert routing.balance_loss.item() == pytest.approx(wanted, abs=1e-6)
    assert routing.load.tolist() == [6, 6, 0, 0]  # the bias follows the load that was sent


def test_importance_and_load_follow_the_formula() -> None:
    """Shazeer et al., eq. 6 to 11: CV(sum of gates)^2 + CV(sum of chances)^2."""
    module, x = build(router_of(selection="noisy_top_k", top_k=2)), some_tokens()
    choice = module(x)
    importance = [0.0] * N_EXPERTS
    for row, gates in zip(choice.experts.tolist(), choice.weights.tolist(), strict=True):
        for e, gate in zip(row, gates, strict=True):
            importance[e] += gate
    assert choice.chance is not None
    wanted = 0.0
    for sums in (importance, choice.chance.double().sum(0).tolist()):
        mean = sum(sums) / N_EXPERTS
        wanted += sum((v - mean) ** 2 for v in sums) / N_EXPERTS / mean**2
    balance = LoadBalancer(N_EXPERTS, loss="importance", aux_coef=0.1)
    routing = balance(choice, torch.zeros(()))
    assert routing.balance_loss.item() == pytest.approx(wanted, rel=1e-4)
    routing.balance_loss.backward()
    assert module.noise.weight.grad.abs().sum() > 0
