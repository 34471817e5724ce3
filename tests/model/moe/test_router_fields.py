"""Fields of routers against their formulas in float64, brute force, and routers of transformers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from routers import router_of
from torch import Tensor

from moenas.errors import SpaceError
from moenas.grammar import tree
from moenas.model import Gating, LoadBalancer, Router
from moenas.model.architecture import Architecture
from moenas.records import Plain

D_MODEL, N_EXPERTS, TOKENS = 16, 8, 60


def build(router: Router, seed: int = 0) -> Gating:
    module = router.build(D_MODEL, N_EXPERTS)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.3, 0.5, generator=generator)
    return module


def some_tokens(seed: int = 1) -> Tensor:
    return torch.randn(TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))


def weights_of(choice: Any) -> list[dict[int, float]]:
    """Expert -> weight of each token, of the slots that are kept."""
    kept = torch.ones_like(choice.experts) if choice.kept is None else choice.kept
    rows = zip(choice.experts.tolist(), choice.weights.tolist(), kept.tolist(), strict=True)
    return [{e: w for e, w, k in zip(*row, strict=True) if k} for row in rows]


# --- experts from each group ---------------------------------------------------------------------

GROUPED = {
    "one of each group": router_of(
        top_k=4, selection={"kind": "top_k", "n_groups": 4, "top_groups": 4, "even_groups": True}
    ),
    "two of each half": router_of(
        top_k=4, selection={"kind": "top_k", "n_groups": 2, "top_groups": 9, "even_groups": True}
    ),
    "one of each of the two best groups": router_of(
        top_k=2,
        selection={
            "kind": "top_k",
            "n_groups": 4,
            "top_groups": 2,
            "group_score": "top2_sum",
            "even_groups": True,
        },
    ),
}


@pytest.mark.parametrize("router", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("biased", [False, True])
def test_each_open_group_gives_as_many_experts(router: Router, biased: bool) -> None:
    """MoGE, arXiv 2505.21411, eq. 5 and 6: the best of each group by a softmax over all experts."""
    module, x = build(router), some_tokens()
    bias = torch.linspace(-0.3, 0.3, N_EXPERTS)[torch.randperm(N_EXPERTS)] if biased else None
    choice = module(x, bias)
    scores = (x.double() @ module.logits.weight.double().T).softmax(-1)
    size = N_EXPERTS // router.selection.n_groups
    for token, weights in enumerate(weights_of(choice)):
        s = scores[token].tolist()
        ranked = [a + b for a, b in zip(s, [0.0] * 8 if bias is None else bias, strict=True)]
        groups = [range(g * size, g * size + size) for g in range(router.selection.n_groups)]
        best = 2 if router.selection.group_score == "top2_sum" else 1

        def worth(group: range, by: list[float] = ranked, n: int = best) -> float:
            return sum(sorted((by[e] for e in group), reverse=True)[:n])

        open_groups = sorted(groups, key=worth, reverse=True)[: router.selection.top_groups]
        each = router.top_k // len(open_groups)
        chosen = [
            e for g in open_groups for e in sorted(g, key=lambda e: ranked[e], reverse=True)[:each]
        ]
        whole = sum(s[e] for e in chosen)
        assert weights == pytest.approx({e: s[e] / whole for e in chosen}, abs=1e-5)


def test_groups_that_do_not_give_alike_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"top_k \(3\) must be a multiple of the 2 groups"):
        parse(
            {
                "top_k": 3,
                "selection": {"kind": "top_k", "n_groups": 2, "top_groups": 2, "even_groups": True},
            }
        )


# --- from what the router reads to its logits ----------------------------------------------------

LOGITS: dict[str, Plain] = {
    "norm": {"logits": {"kind": "linear", "input_norm": True}},
    "projection": {"logits": {"kind": "linear", "hidden": 24, "hidden_activation": "none"}},
    "cosine": {"logits": {"kind": "cosine"}},
    "x-moe": {
        "logits": {"kind": "cosine", "hidden": 8, "hidden_activation": "none", "multiplier": 3.0}
    },
    "cosine with a bias": {"logits": {"kind": "cosine", "add_bias": True}},
    "standardised": {"logits": {"kind": "linear", "standardize": True, "multiplier": 2.0}},
    "standardised with a bias": {
        "logits": {"kind": "linear", "standardize": True, "add_bias": True, "hidden": 16}
    },
    "standardised cosine": {"logits": {"kind": "cosine", "standardize": True, "add_bias": True}},
    "scaled": {"logits": {"kind": "linear", "multiplier": 0.25}},
    "capped": {"logits": {"kind": "linear", "cap": 0.5, "multiplier": 4.0}},
    "all": {
        "logits": {
            **{"kind": "cosine", "input_norm": True, "hidden": 8, "add_bias": True},
            **{"multiplier": 2.0, "cap": 1.5},
        },
    },
}


def written_out(fields: Plain, module: Gating, x: Tensor) -> Tensor:
    """The logits (T, E) in float64, by the formula of each field, one after another."""
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    h = x.double()
    if fields.get("input_norm"):
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["enter.norm.weight"]
    if "hidden" in fields:
        h = h @ weights["logits.hidden.weight"].T
        h = h if "hidden_activation" in fields else h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    w = weights["logits.weight"]
    if fields["kind"] == "cosine":
        h, w = (v / v.square().sum(-1, keepdim=True).sqrt() for v in (h, w))
    z = h @ w.T
    z = z * weights["logits.temperature"].exp() if "logits.temperature" in weights else z
    z = z + weights["logits.bias"] if fields.get("add_bias") else z
    if fields.get("standardize"):
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    z = z * fields.get("multiplier", 1.0)
    cap = fields.get("cap")
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("name", LOGITS)
def test_the_logits_follow_the_formulas(name: str) -> None:
    fields = LOGITS[name]["logits"]
    module, x = build(router_of(logits=fields)), some_tokens()
    assert ("logits.temperature" in dict(module.named_parameters())) == (
        fields["kind"] == "cosine" and ("standardize" not in fields or "add_bias" in fields)
    )
    wanted = written_out(fields, module, x)
    torch.testing.assert_close(module(x).logits.double(), wanted, rtol=1e-5, atol=1e-5)
    assert module(x.bfloat16()).logits.dtype == torch.float32


def test_cosines_do_not_see_how_long_a_token_is() -> None:
    module, x = build(router_of(logits="cosine")), some_tokens()
    torch.testing.assert_close(module(x).logits, module(7 * x).logits)
    assert module(x).logits.abs().max() <= module.logits.temperature.exp()


def test_standardised_logits_have_the_spread_that_is_asked_for() -> None:
    logits = build(router_of(logits={"kind": "linear", "standardize": True, "multiplier": 3.0}))(
        some_tokens()
    ).logits
    torch.testing.assert_close(logits.mean(-1), torch.zeros(TOKENS), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logits.std(-1, correction=0), torch.full((TOKENS,), 3.0), atol=1e-3, rtol=0
    )


def test_standardised_logits_of_two_experts_are_refused() -> None:
    with pytest.raises(SpaceError, match="with standardize: true and 2 experts"):
        parse({"logits": {"kind": "linear", "standardize": True}, "top_k": 1}, n_experts=2)


@pytest.mark.parametrize("normalize", [True, False])
def test_each_expert_has_a_factor_of_its_own(normalize: bool) -> None:
    router = router_of(top_k=3, normalize=normalize, scale=1.5, expert_scale=True)
    module, x = build(router), some_tokens()
    choice = module(x)
    scores = choice.logits.double().softmax(-1)
    factors = module.weights.expert_scale.double()
    for token, weights in enumerate(weights_of(choice)):
        whole = sum(scores[token, e].item() for e in weights) if normalize else 1.0
        wanted = {e: 1.5 * scores[token, e].item() / whole * factors[e].item() for e in weights}
        assert weights == pytest.approx(wanted, abs=1e-5)


# --- the same as in transformers -----------------------------------------------------------------


def spread_out(module: torch.nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.3, 0.7, generator=generator)


def assert_same_choice(choice: Any, experts: Tensor, weights: Tensor) -> None:
    rows = zip(experts.tolist(), weights.tolist(), strict=True)
    for ours, theirs in zip(weights_of(choice), rows, strict=True):
        assert ours == pytest.approx(dict(zip(*theirs, strict=True)), abs=1e-5)


@torch.no_grad()
def test_the_router_of_gemma_4() -> None:
    pytest.importorskip("transformers")
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    theirs = Gemma4TextRouter(
        Gemma4TextConfig(hidden_size=D_MODEL, num_experts=N_EXPERTS, top_k_experts=3)
    )
    spread_out(theirs)
    router = tree.parse(
        Router,
        {
            "preset": "gemma_4",
            "top_k": 3,
            "logits": {"kind": "linear", "multiplier": D_MODEL**-0.5},
        },
    )
    ours = router.build(D_MODEL, N_EXPERTS)
    ours.enter.norm.weight.copy_(theirs.scale)
    ours.logits.weight.copy_(theirs.proj.weight)
    ours.weights.expert_scale.copy_(theirs.per_expert_scale)
    x = 3 * some_tokens()
    _, weights, experts = theirs(x)
    assert_same_choice(ours(x), experts, weights)


@torch.no_grad()
def test_the_router_of_laguna() -> None:
    pytest.importorskip("transformers")
    from transformers.models.laguna.configuration_laguna import LagunaConfig
    from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

    sizes = {"hidden_size": D_MODEL, "num_experts": N_EXPERTS, "num_experts_per_tok": 3}
    theirs = LagunaTopKRouter(LagunaConfig(**sizes, moe_router_logit_softcapping=1.2))
    spread_out(theirs)
    ours = router_of(top_k=3, score="sigmoid", logits={"kind": "linear", "cap": 1.2}).build(
        D_MODEL, N_EXPERTS
    )
    ours.logits.weight.copy_(theirs.weight)
    _, weights, experts = theirs(some_tokens())
    assert_same_choice(ours(some_tokens(), theirs.e_score_correction_bias), experts, weights)


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_the_weights_of_phi_moe(eps: float) -> None:
    """As theirs in evaluation; both weights, with logits of either sign."""
    pytest.importorskip("transformers")
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    module = build(
        router_of(top_k=2, normalize=False, selection={"kind": "top_k", "sparsemixer_eps": eps})
    )
    for seed in range(4):
        choice = module(0.3 * some_tokens(seed) - 0.2)
        weights, experts = sparsemixer(choice.logits, eps, training=False)
        assert choice.experts.tolist() == experts.tolist()
        torch.testing.assert_close(choice.weights, weights)
        assert (choice.weights < 0.99).any() or eps < 0.1


def test_sparsemixer_takes_experts_one_after_another() -> None:
    """Written out for any number of experts, and for a bias that chooses others than the best."""
    eps, module = (
        0.4,
        build(
            router_of(top_k=4, normalize=False, selection={"kind": "top_k", "sparsemixer_eps": 0.4})
        ),
    )
    bias = torch.linspace(-0.2, 0.2, N_EXPERTS)
    choice = module(some_tokens(), bias)
    for token, weights in enumerate(weights_of(choice)):
        z, taken = choice.logits[token].double().tolist(), set[int]()
        wanted = {}
        for e in choice.experts[token].tolist():
            near = [
                j
                for j in range(N_EXPERTS)
                if j not in taken and z[e] - z[j] <= 2 * eps * max(abs(z[j]), z[e])
            ]
            wanted[e] = math.exp(z[e]) / sum(math.exp(z[j]) for j in near)
            taken.add(e)
        assert weights == pytest.approx(wanted, abs=1e-5)


def test_sparsemixer_weights_teach_the_router() -> None:
    """The gradient of a weight equals the gradient of its formula, by differences in float64."""
    module, x = (
        build(
            router_of(top_k=2, normalize=False, selection={"kind": "top_k", "sparsemixer_eps": 0.4})
        ).double(),
        some_tokens(),
    )
    logits = (0.3 * x[:5, :N_EXPERTS].double()).requires_grad_()
    experts = logits.topk(2, dim=-1).indices
    assert torch.autograd.gradcheck(
        lambda z: module.weights.sparsemixer_weights(z, experts), (logits,)
    )


# --- a share of the scores -----------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_the_smallest_set_that_reaches_the_share_is_kept(score: str, top_p: float) -> None:
    """arXiv 2403.07652, by trying all sets; the weights are the shares of the sum, unchanged."""
    module, x = (
        build(
            router_of(
                top_k=N_EXPERTS,
                score=score,
                selection={"kind": "top_k", "top_p": top_p},
                normalize=False,
            )
        ),
        some_tokens(),
    )
    choice, sizes = module(x), set()
    for token, weights in enumerate(weights_of(choice)):
        scores = choice.scores[token].double().tolist()
        first = next(
            best
            for size in range(1, N_EXPERTS + 1)
            for best in [
                max(itertools.combinations(range(8), size), key=lambda s: sum(scores[e] for e in s))
            ]
            if sum(scores[e] for e in best) >= top_p * sum(scores)
        )
        assert weights == pytest.approx({e: scores[e] for e in first}, abs=1e-5)
        sizes.add(len(first))
    assert len(sizes) > 1


def test_a_token_gets_top_k_at_the_most_and_one_at_least() -> None:
    module = build(router_of(top_k=3, selection={"kind": "top_k", "top_p": 0.6}))
    choice = module(some_tokens())
    counts = choice.kept.sum(-1)
    assert counts.min() == 1
    assert counts.max() == 3
    torch.testing.assert_close(choice.weights.sum(-1), torch.ones(TOKENS))
    assert not choice.weights[~choice.kept].any()


def test_a_share_that_one_expert_has_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"top_p \(0.2\) is reached by one of 4 experts"):
        parse({"top_k": 2, "selection": {"kind": "top_k", "top_p": 0.2}}, n_experts=4)


def test_the_entropy_is_that_of_scipy() -> None:
    module = build(router_of(top_k=2, score="sigmoid"))
    balance = LoadBalancer(N_EXPERTS, entropy_coef=0.5)
    choice = module(some_tokens())
    routing = balance(choice, torch.zeros(()))
    wanted = scipy.stats.entropy(choice.scores.detach().double().numpy(), axis=-1).mean()
    assert routing.entropy.item() == pytest.approx(wanted, abs=1e-5)
    assert balance.auxiliary_loss(routing).item() == pytest.approx(0.5 * wanted, abs=1e-5)
    assert balance.eval()(choice, torch.zeros(())).entropy == 0


def test_the_entropy_loss_leaves_a_token_fewer_experts() -> None:
    router = router_of(
        top_k=N_EXPERTS, selection={"kind": "top_k", "top_p": 0.8}, balance="none", entropy_coef=1.0
    )
    module, balance = build(router), router.build_balancer(N_EXPERTS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    counts = []
    for _ in range(60):
        choice = module(some_tokens())
        counts.append(choice.kept.float().sum(-1).mean().item())
        optimizer.zero_grad()
        balance.auxiliary_loss(balance(choice, torch.zeros(()))).backward()
        optimizer.step()
    assert counts[-1] < 0.7 * counts[0]


# --- what the router reads -----------------------------------------------------------------------

ATTENTION: Plain = {"kind": "attention", "head_dim": 8}


def parse(router: Plain, n_experts: int = 4, **fields: Any) -> Architecture:
    ffn = {"kind": "moe", "n_experts": n_experts, "d_expert": 8, "router": router}
    blocks = [{"mixer": ATTENTION, "ffn": ffn}]
    return Architecture.parse({"vocab_size": 30, "d_model": D_MODEL, "blocks": blocks, **fields})


def explicit_attention(block: Any, x: Tensor, source: str) -> Tensor:
    """A pre-norm block in which the router reads `source`: every expert on every token."""
    stream = x + block.mixer(block.norm1(x), None)
    read, moe = block.norm2(stream), block.ffn
    z = {"ffn": read, "stream": stream, "block": x}[source] @ moe.router.logits.weight.T
    best = z.softmax(-1).topk(2, dim=-1)
    weights = torch.zeros_like(z).scatter(-1, best.indices, best.values / best.values.sum(-1, True))
    y = torch.zeros_like(x)
    for e in range(moe.experts.n_experts):
        gate, up = (read @ moe.experts.up[e]).chunk(2, dim=-1)
        y = y + weights[..., e : e + 1] * (F.silu(gate) * up @ moe.experts.down[e])
    return stream + y


@torch.no_grad()
@pytest.mark.parametrize("source", ["ffn", "stream", "block"])
def test_the_router_reads_its_source(source: str) -> None:
    """`block` is the layer of SmallThinker as released: its router reads before the first norm."""
    model = parse({"top_k": 2, "logits": {"kind": "linear", "input": source}}).build().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.2, 0.5, generator=generator)
    x = torch.randn(2, 9, D_MODEL, generator=generator)
    output = model.blocks[0](x)
    torch.testing.assert_close(
        output, explicit_attention(model.blocks[0], x, source), rtol=1e-4, atol=1e-4
    )
    for other in {"ffn", "stream", "block"} - {source}:
        assert not torch.allclose(output, explicit_attention(model.blocks[0], x, other), atol=1e-2)


# --- one function, one form ----------------------------------------------------------------------

ALIKE: list[tuple[Router, Router]] = [
    (router_of(selection={"kind": "top_k", "even_groups": True}), Router()),
    (
        router_of(selection={"kind": "top_k", "n_groups": 4, "top_groups": 1, "even_groups": True}),
        router_of(selection={"kind": "top_k", "n_groups": 4, "top_groups": 1}),
    ),
    (
        router_of(
            top_k=4,
            selection={
                "kind": "top_k",
                "n_groups": 4,
                "top_groups": 9,
                "even_groups": True,
                "group_score": "top2_sum",
            },
        ),
        router_of(
            top_k=4,
            selection={"kind": "top_k", "n_groups": 4, "top_groups": 4, "even_groups": True},
        ),
    ),
    (
        router_of(
            top_k=4,
            selection={"kind": "top_k", "n_groups": 8, "top_groups": 4, "even_groups": True},
        ),
        router_of(top_k=4),
    ),
    (
        router_of(
            top_k=4,
            selection={"kind": "top_k", "n_groups": 4, "top_groups": 2, "even_groups": True},
        ),
        router_of(top_k=4, selection={"kind": "top_k", "n_groups": 4, "top_groups": 2}),
    ),
    (router_of(selection={"kind": "top_k", "top_p": 1.0}), Router()),
    (router_of(top_k=1, selection={"kind": "top_k", "top_p": 0.5}), router_of(top_k=1)),
    (router_of(logits={"kind": "linear", "hidden_activation": "none"}), Router()),
    (
        router_of(
            score="uniform",
            selection="hash",
            logits={"kind": "cosine", "cap": 2.0, "input_norm": True},
        ),
        router_of(score="uniform", selection="hash"),
    ),
    (
        router_of(
            score="uniform",
            selection="hash",
            logits={"kind": "linear", "input": "block"},
            entropy_coef=0.1,
        ),
        router_of(score="uniform", selection="hash"),
    ),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_spellings_of_one_router_have_one_form(one: Router, other: Router) -> None:
    assert one != other
    forms = [router.canonical_among(N_EXPERTS) for router in (one, other)]
    assert forms[0] == forms[1] == forms[0].canonical_among(N_EXPERTS)
    choices = [build(router)(some_tokens(), tokens=torch.arange(TOKENS)) for router in (one, other)]
    torch.testing.assert_close(choices[0].table(), choices[1].table())


def test_all_experts_by_top_p_or_sparsemixer_are_not_all_by_score() -> None:
    """Where all are chosen, softmax scores add up to 1, but these weights do not."""
    forms = {
        router_of(top_k=4, normalize=normalize, **fields).canonical_among(4)
        for normalize in (True, False)
        for fields in (
            {"selection": {"kind": "top_k", "top_p": 0.6}},
            {"selection": {"kind": "top_k", "sparsemixer_eps": 0.3}},
        )
    }
    assert len(forms) == 4
    assert {form.balance.kind for form in forms if form.top_p} == {"aux_loss"}


WORDS = ("ffn", "stream", "block")


@pytest.mark.parametrize(
    ("fields", "block", "kinds"),
    [
        ({}, {}, [{"ffn"}, {"stream"}, {"block"}]),
        ({"norm_position": "sandwich"}, {}, [{"ffn"}, {"stream"}, {"block"}]),
        ({"norm_position": "post"}, {}, [{"ffn", "stream"}, {"block"}]),
        ({"norm_position": "output"}, {"parallel": True}, [{"ffn", "stream", "block"}]),
        ({}, {"parallel": True}, [{"ffn"}, {"stream", "block"}]),
        ({}, {"mixer": None}, [{"ffn"}, {"stream", "block"}]),
        ({"norm_position": "post"}, {"mixer": None}, [{"ffn", "stream", "block"}]),
    ],
)
def test_words_for_one_source_are_one(fields: Plain, block: Plain, kinds: list[set[str]]) -> None:
    by_word: dict[str, set[str]] = {}
    for word in WORDS:
        plain = parse({"logits": {"kind": "linear", "input": word}}, **fields).plain()
        plain["blocks"][0] |= block
        by_word.setdefault(Architecture.parse(plain).fingerprint, set()).add(word)
    assert sorted(map(sorted, by_word.values())) == sorted(map(sorted, kinds))
