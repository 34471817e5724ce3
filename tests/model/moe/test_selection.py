"""Selections that balance, and the gate that keeps later tokens out of earlier outputs."""

from __future__ import annotations

import math

import pytest
import torch
from routers import router_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moenas.errors import SpaceError
from moenas.grammar import tree
from moenas.model import MoE, MoEFFN, Router
from moenas.model.architecture import Architecture
from moenas.model.moe.batch_selection import Base, ExpertChoice, Sinkhorn
from moenas.model.moe.selection import Hash, Selection, Threshold

D_MODEL, LENGTH = 16, 12


def scores(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_tokens, n_experts, generator=generator)


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(12, 4, 2), (7, 3, 1), (5, 4, 4)])
def test_each_expert_chooses_its_best_tokens(n_tokens: int, n_experts: int, top_k: int) -> None:
    s = scores(n_tokens, n_experts)
    picked = ExpertChoice(top_k)(s, s)
    chosen = set(zip(picked.tokens.tolist(), picked.experts.flatten().tolist(), strict=True))
    wanted = set()
    for e in range(n_experts):
        ranks = sorted(range(n_tokens), key=lambda t: float(s[t, e]), reverse=True)
        wanted |= {(t, e) for t in ranks[: math.ceil(top_k * n_tokens / n_experts)]}
    assert chosen == wanted


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


@pytest.mark.parametrize(("n_tokens", "n_experts"), [(24, 4), (23, 4), (3, 5), (40, 2), (6, 1)])
def test_the_assignment_is_even_and_the_best_there_is(n_tokens: int, n_experts: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(n_tokens, n_experts, generator=generator) * 3
        logits[:, 0] += 2.0
        selection, room = Base(1), math.ceil(n_tokens / n_experts)
        chosen = selection(logits, logits).experts
        assert torch.bincount(chosen.flatten(), minlength=n_experts).max() <= room
        places = logits.repeat_interleave(room, dim=1).numpy()  # an expert is `room` places
        rows, columns = linear_sum_assignment(places, maximize=True)
        best = places[rows, columns].sum()
        step = 0.005 * (logits.max() - logits.min()) + 1e-5
        assert best - n_tokens * step <= logits.gather(-1, chosen).sum() <= best + 1e-4
        assert torch.equal(selection.eval()(logits, logits).experts[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(64, 4),
        torch.full((64, 4), math.nan),
        torch.tensor([1e6, 1e6, 0.0, -math.inf]).expand(64, 4),
        torch.tensor([math.inf, 1.0, 0.0, -1e30]).expand(64, 4),
    ],
)
def test_any_logits_are_assigned_evenly(logits: Tensor) -> None:
    load = torch.bincount(Base(1)(logits, logits).experts.flatten(), minlength=4)
    assert load.tolist() == [16, 16, 16, 16]


def test_a_hash_sends_a_token_to_the_same_distinct_experts_and_all_experts_alike() -> None:
    n_tokens, n_experts, top_k = 50_000, 16, 3
    nothing, ids = torch.zeros(n_tokens, n_experts), torch.arange(n_tokens)
    chosen = Hash(top_k, n_experts)(nothing, nothing, ids).experts
    assert all(len(set(row)) == top_k for row in chosen[:2000].tolist())
    mean = n_tokens * top_k / n_experts
    load = torch.bincount(chosen.flatten(), minlength=n_experts)
    # The deviation of a binomial load is 88; pairs of experts meet as often as by chance.
    assert (load - mean).abs().max() < 5 * math.sqrt(mean)
    pairs = torch.bincount((chosen[:, 0] * n_experts + chosen[:, 1]), minlength=n_experts**2)
    expected = n_tokens / (n_experts * (n_experts - 1))
    off = ~torch.eye(n_experts, dtype=torch.bool).flatten()
    assert (pairs[off] - expected).abs().max() < 6 * math.sqrt(expected)
    again = Hash(top_k, n_experts)(nothing[:5], nothing[:5], ids[:5].flip(0)).experts
    assert torch.equal(again.flip(0), chosen[:5])


def test_a_hash_needs_the_token_ids() -> None:
    moe = MoEFFN(n_experts=4, d_expert=8, router=router_of(selection="hash")).build(D_MODEL)
    with pytest.raises(ValueError, match="token ids"):
        moe(torch.randn(1, 3, D_MODEL))


def hashed(**router: object) -> Architecture:
    ffn = {"kind": "moe", "n_experts": 4, "d_expert": 8, "router": {"selection": "hash", **router}}
    blocks = [{"mixer": {"kind": "attention", "head_dim": 8}, "ffn": ffn}]
    return Architecture.parse({"vocab_size": 50, "d_model": 16, "blocks": blocks})


def test_a_model_routes_equal_tokens_alike() -> None:
    model = hashed(score="uniform", top_k=1).build().eval()
    tokens = torch.tensor([[7, 8, 7, 9, 8]])
    model(tokens)
    [(_, moe)] = model.moe_layers()
    nothing = torch.zeros(5, 4)
    wanted = moe.router.selection(nothing, nothing, tokens.flatten()).experts
    assert wanted[0] == wanted[2]
    assert moe.routing.load.tolist() == torch.bincount(wanted.flatten(), minlength=4).tolist()


def test_hash_layers_have_no_router_to_learn() -> None:
    plain = hashed(score="uniform", top_k=2, normalize=False)
    assert not any("router" in name for name, _ in plain.build().named_parameters())
    same = [
        {"balance": "bias"},
        {"logits": {"kind": "linear", "hidden": 8}},
        {"logits": {"kind": "linear", "jitter": 0.1}},
        {"z_coef": 0.1},
        {"logits": {"kind": "linear", "add_bias": True}},
    ]
    for fields in same:
        other = hashed(score="uniform", top_k=2, normalize=False, **fields)
        assert other.fingerprint == plain.fingerprint
    halved = hashed(score="uniform", top_k=2, normalize=True, scale=2.0)
    assert halved.fingerprint == plain.fingerprint
    assert hashed(top_k=2).fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"score": "uniform"}, "take selection: 'hash'"),
        ({"selection": "base", "allow_acausal": True}, "write top_k: 1"),
        ({"selection": "hash", "top_k": 1, "normalize": True}, "learns nothing"),
        ({"selection": "hsh"}, "top_k, noisy_top_k"),
        ({"score": "sofmax"}, "There are softmax, sigmoid"),
    ],
)
def test_selections_that_do_not_go_are_refused(fields: dict[str, object], wanted: str) -> None:
    with pytest.raises(SpaceError, match=wanted):
        tree.parse(Router, fields)


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


def test_a_cut_off_of_0_is_one() -> None:
    """Scores of relu are 0 for most: then no token goes to an expert that scores it 0."""
    selection = Threshold(1, 4)
    silent = torch.zeros(8, 4)
    silent[0] = 1.0
    assert selection(silent, silent).kept.sum() == 8  # the best of each: no cut-offs yet
    selection.after_step()
    assert selection.cutoff.tolist() == [0.0] * 4
    assert selection(silent, silent).kept.sum() == 2  # of the one that is over 0, the 2 K best


def test_a_step_without_training_before_it_moves_no_cut_off() -> None:
    selection = Threshold(1, 4)
    selection(scores(10, 4), scores(10, 4))
    selection.after_step()
    before = selection.cutoff.clone()
    selection.eval()
    selection(scores(10, 4, seed=1), scores(10, 4))
    selection.after_step()
    assert torch.equal(selection.cutoff, before)


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
    "groups": router_of(
        selection={"kind": "top_k", "n_groups": 2, "top_groups": 1, "group_score": "top2_sum"}
    ),
    "capacity": router_of(capacity_factor=0.5),
    "noisy": router_of(selection="noisy_top_k", balance="importance_load"),
    "jitter": router_of(logits={"kind": "linear", "jitter": 0.1}),
    "bias": router_of(balance={"kind": "bias_and_loss", "scope": "sequence"}, score="sigmoid"),
    "hash": router_of(selection="hash", score="sqrt_softplus"),
    "hash layers": router_of(selection="hash", score="uniform", top_k=1, capacity_factor=1.0),
    "threshold": router_of(selection="threshold"),
    "threshold with room": router_of(selection="threshold", capacity_factor=0.5),
}
LOOK_AHEAD = {
    "expert_choice": router_of(selection="expert_choice", allow_acausal=True),
    "sinkhorn": router_of(selection="sinkhorn", allow_acausal=True, top_k=1, normalize=False),
    "base": router_of(selection="base", score="sigmoid", allow_acausal=True, top_k=1),
}


def layer(router: Router) -> MoE:
    fields = {"n_zero_experts": 1, "zero_kind": "constant", "n_shared_experts": 1}
    moe = MoEFFN(n_experts=7, d_expert=8, router=router, **fields).build(D_MODEL)
    assert isinstance(moe, MoE)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    x = torch.randn(4, LENGTH, D_MODEL, generator=generator)
    moe(x, numbers(x))
    moe.after_step()
    return moe


def numbers(x: Tensor) -> Tensor:
    """Numbers of the tokens: equal vectors have equal ones."""
    return (x[..., 0] * 1000).round().long() % 50


def seeded(moe: MoE, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    y: Tensor = moe(x, numbers(x)).detach()
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
        alone, beside = seeded(moe, x[i : i + 1])[0], seeded(moe, x)[i]
        torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


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
        tree.parse(Router, {"selection": name})
    given = {"selection": name, "allow_acausal": True, "top_k": 1}
    assert tree.parse(Router, given).selection.kind == name


def test_class_attributes_of_a_users_selection_are_known_by_their_former_names() -> None:
    class Mine(Selection, kind="former_attributes"):
        alone = True
        learned = False

    try:
        assert (Mine.per_token, Mine.trainable_load) == (True, False)
        assert (Mine.expert_choice, Mine.variable_k) == (False, False)
    finally:
        del Selection.kinds["former_attributes"]
