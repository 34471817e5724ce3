"""Selections that balance, and the gate that keeps later tokens out of earlier outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moenas import grammar
from moenas.errors import SpaceError
from moenas.parts import MoE, MoEFFN, Router
from moenas.parts.selection import ExpertChoice, Sinkhorn, Threshold

D_MODEL, LENGTH = 16, 12


def scores(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_tokens, n_experts, generator=generator)


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(12, 4, 2), (7, 3, 1), (5, 4, 4)])
def test_each_expert_chooses_its_best_tokens(n_tokens: int, n_experts: int, top_k: int) -> None:
    s = scores(n_tokens, n_experts)
    picked = ExpertChoice(top_k)(s, s)
    found = set(zip(picked.tokens.tolist(), picked.experts.flatten().tolist(), strict=True))
    wanted = set()
    for e in range(n_experts):
        ranks = sorted(range(n_tokens), key=lambda t: float(s[t, e]), reverse=True)
        wanted |= {(t, e) for t in ranks[: math.ceil(top_k * n_tokens / n_experts)]}
    assert found == wanted


def test_a_balanced_plan_evens_out_a_favourite() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 3.0
    selection = Sinkhorn(1, rounds=50)
    load = torch.bincount(selection(logits, logits).experts.flatten(), minlength=4)
    assert load.max() <= 20
    plain = torch.bincount(selection.eval()(logits, logits).experts.flatten(), minlength=4)
    assert plain.max() > 50
    assert plain.tolist() == torch.bincount(logits.argmax(-1), minlength=4).tolist()


def test_the_plan_is_that_of_the_scaling_written_out() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    plan = logits.double().exp().tolist()
    for _ in range(8):
        sums = [sum(row[e] for row in plan) for e in range(3)]
        plan = [[v / sums[e] for e, v in enumerate(row)] for row in plan]
        plan = [[v / sum(row) for v in row] for row in plan]
    wanted = [sorted(range(3), key=lambda e: row[e], reverse=True)[:2] for row in plan]
    assert Sinkhorn(2)(logits, logits).experts.tolist() == wanted


def test_the_cut_off_is_a_moving_average_of_the_last_score_taken() -> None:
    selection, cutoff = Threshold(1, 4), [0.0] * 4
    for step in range(3):
        s = scores(10, 4, seed=step)
        picked = selection(s, s)
        for t, row in enumerate(picked.experts.tolist()):
            best = sorted(range(4), key=lambda e: float(s[t, e]), reverse=True)
            assert row == best[:2]
            for place, e in enumerate(row):
                above = place < 1 if cutoff[e] == 0 else float(s[t, e]) > cutoff[e]
                assert bool(picked.kept[t, place]) == above
        selection.after_step()
        last = [sorted(s[:, e].tolist(), reverse=True)[2] for e in range(4)]  # ceil(10 / 4) = 3
        old = zip(cutoff, last, strict=True)
        cutoff = [new if c == 0 else 0.9 * c + 0.1 * new for c, new in old]
        assert selection.cutoff.tolist() == pytest.approx(cutoff, rel=1e-5)


def test_a_threshold_learns_to_send_top_k_on_average() -> None:
    torch.manual_seed(0)
    selection = Threshold(2, 8)
    for step in range(40):
        selection(scores(64, 8, seed=step), scores(64, 8))
        selection.after_step()
    selection.eval()
    s = scores(2000, 8, seed=99)
    assert selection(s, s).kept.sum() / 2000 == pytest.approx(2, abs=0.3)


SELECTIONS = {
    "top_k": Router(),
    "groups": Router(n_groups=2, top_groups=1, group_score="top2_sum"),
    "capacity": Router(capacity_factor=0.5),
    "noisy": Router(selection="noisy_top_k", balance="importance_load"),
    "jitter": Router(jitter=0.1),
    "bias": Router(balance="bias_and_loss", aux_scope="sequence", score="sigmoid"),
    "threshold": Router(selection="threshold"),
    "threshold with room": Router(selection="threshold", capacity_factor=0.5),
}
LOOK_AHEAD = {
    "expert_choice": Router(selection="expert_choice", allow_acausal=True),
    "sinkhorn": Router(selection="sinkhorn", allow_acausal=True, top_k=1, normalize=False),
}


def layer(router: Router) -> MoE:
    fields = {"n_zero_experts": 1, "zero_kind": "constant", "n_shared_experts": 1}
    moe = MoEFFN(n_experts=7, d_expert=8, router=router, **fields).build(D_MODEL)
    assert isinstance(moe, MoE)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    moe(torch.randn(4, LENGTH, D_MODEL, generator=generator))
    moe.after_step()
    return moe


def seeded(moe: MoE, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    y: Tensor = moe(x).detach()
    return y


def leak(router: Router, train: bool) -> float:
    """How far outputs move when tokens after them, and other sequences, are others."""
    moe = layer(router).train(train)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, LENGTH, D_MODEL, generator=generator)
    y, worst = seeded(moe, x), 0.0
    for cut in range(1, LENGTH):
        later = torch.cat((x[:, :cut], torch.randn(x[:, cut:].shape, generator=generator)), dim=1)
        worst = max(worst, float((seeded(moe, later) - y)[:, :cut].abs().max()))
    beside = torch.cat((x[:1], torch.randn(x[1:].shape, generator=generator)))
    return max(worst, float((seeded(moe, beside) - y)[0].abs().max()))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", SELECTIONS)
def test_no_later_token_and_no_other_sequence_changes_an_output(name: str, train: bool) -> None:
    assert SELECTIONS[name].causal
    assert leak(SELECTIONS[name], train) < 1e-5


@pytest.mark.parametrize("name", SELECTIONS)
def test_alone_and_in_a_batch_are_the_same(name: str) -> None:
    moe = layer(SELECTIONS[name]).eval()
    x = torch.randn(3, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        torch.testing.assert_close(moe(x[i : i + 1])[0], moe(x)[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_what_is_marked_as_looking_ahead_does(name: str) -> None:
    router = LOOK_AHEAD[name]
    assert not router.causal
    assert not MoEFFN(n_experts=8, d_expert=8, router=router).causal
    assert leak(router, train=True) > 0.01
    assert (leak(router, train=False) > 0.01) == (name == "expert_choice")


@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_looking_ahead_is_refused_unless_asked_for(name: str) -> None:
    with pytest.raises(SpaceError, match=r"depend on later tokens.*allow_acausal: true"):
        grammar.parse(Router, {"selection": name})
    assert grammar.parse(Router, {"selection": name, "allow_acausal": True}).selection == name
