"""Every field of experts against all experts on all tokens; cost; spellings of one function."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import router_of
from torch import Tensor, nn

from moenas.errors import SpaceError
from moenas.evaluate.flops import count_flops
from moenas.grammar import tree
from moenas.model import FFN, DenseFFN, MoE, MoEFFN, ProductKeyFFN
from moenas.model.architecture import Architecture
from moenas.model.layers.activations import GATED, PLAIN, Activation
from moenas.model.moe.experts import Biased
from moenas.testing.parts import _draw

D_MODEL = 16
SLOPES = {
    "swiglu": lambda g: g * torch.sigmoid(g),
    "geglu": lambda g: 0.5 * g * (1 + torch.erf(g / 2**0.5)),
    "geglu_tanh": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
    "reglu": lambda g: g.clamp(min=0),
    "glu": lambda g: 1 / (1 + torch.exp(-g)),
    "bilinear": lambda g: g,
    "relu": lambda g: g.clamp(min=0),
    "relu2": lambda g: g.clamp(min=0) ** 2,
}  # fmt: skip
SLOPES |= {"silu": SLOPES["swiglu"], "gelu": SLOPES["geglu"], "gelu_tanh": SLOPES["geglu_tanh"]}


def test_every_activation_has_a_formula_here() -> None:
    assert set(SLOPES) == set(GATED) | set(PLAIN)


def fill(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        parameter.data.normal_(0, 0.5, generator=generator)


def some_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    x = torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def act(h: Tensor, activation: Activation) -> Tensor:
    if activation.name not in GATED:
        return SLOPES[activation.name](h)
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    if activation.limit is not None:
        gate = torch.minimum(gate, torch.tensor(activation.limit))
        up = torch.maximum(
            torch.minimum(up, torch.tensor(activation.limit)), -torch.tensor(activation.limit)
        )
    late = torch.tensor(activation.activated_limit or torch.inf)
    up = torch.maximum(torch.minimum(up, late), -late)
    if activation.alpha != 1:
        activated = gate / (1 + torch.exp(-activation.alpha * gate))
    else:
        activated = SLOPES[activation.name](gate)
    return torch.minimum(activated, late) * (up + activation.shift)


def all_on_all(moe: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, then weighted by the weight or by 0."""
    choice = moe.router(x.flatten(0, 1), moe.balance.bias)
    table = choice.table()
    ones = torch.ones_like(choice.weights)
    ones = ones if choice.kept is None else ones * choice.kept
    went = choice._replace(weights=ones).table()
    inner = x.flatten(0, 1)
    latent = hasattr(moe.experts, "inner")
    experts = moe.experts.inner if latent else moe.experts
    source = inner @ moe.experts.enter.weight.T if latent else inner
    y = torch.zeros_like(source)
    for e in range(experts.n_experts):
        weight = table[:, e : e + 1]
        h = (source * weight if experts.weight_on == "input" else source) @ experts.up[e]
        h = h if experts.up_bias is None else h + experts.up_bias.weight[e]
        out = act(h, experts.activation) @ experts.down[e]
        out = out if experts.down_bias is None else out + experts.down_bias.weight[e]
        chosen = went[:, e : e + 1] if experts.weight_on == "input" else weight
        y = y + chosen * out
    y = y @ moe.experts.leave.weight.T if latent else y
    for z in range(0 if moe.zero is None else moe.zero.n_experts):
        weight = table[:, experts.n_experts + z].unsqueeze(-1)
        if moe.zero.kind == "identity":
            y = y + weight * inner
        elif moe.zero.kind == "constant":
            mix = torch.softmax(inner @ moe.zero.mix[2 * z : 2 * z + 2].T, dim=-1)
            y = y + weight * (mix[:, :1] * inner + mix[:, 1:] * moe.zero.vector[z])
    network = moe.shared
    if isinstance(network, Biased):
        y, network = y + network.bias, network.network
    if network is not None:
        shared = act(inner @ network.up.weight.T, network.activation)
        shared = shared @ network.down.weight.T
        if hasattr(network, "gate"):
            shared = shared * torch.sigmoid(inner @ network.gate.weight.T)
        y = y + shared
    return y.view_as(x)


def fields_of(seed: int, kind: type[FFN] | None = None) -> FFN:
    """Random valid fields of a kind that needs no numbers of tokens."""
    rng = random.Random(seed)
    while True:
        try:
            part = tree.parse(FFN, _draw(FFN, rng, kind))
        except SpaceError:
            continue
        if part.causal and not (isinstance(part, MoEFFN) and part.router.selection.kind == "hash"):
            return part


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.tuples(st.integers(1, 3), st.integers(1, 9)))
def test_the_mixture_is_all_experts_on_all_tokens(seed: int, shape: tuple[int, int]) -> None:
    part = fields_of(seed, MoEFFN)
    logits = replace(part.router.logits, jitter=0.0)
    part = replace(part, router=replace(part.router, capacity_factor=None, logits=logits))
    moe = part.build(D_MODEL).eval()
    fill(moe)
    x = some_tokens(*shape)
    y, reference = moe(x), all_on_all(moe, x)
    torch.testing.assert_close(y, reference, rtol=1e-3, atol=1e-3)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    leaves = [x, *moe.parameters()]
    gradients = torch.autograd.grad(
        (y * direction).sum(), leaves, allow_unused=True, retain_graph=True
    )
    wanted = torch.autograd.grad((reference * direction).sum(), leaves, allow_unused=True)
    for a, b in zip(gradients, wanted, strict=True):
        # A weight that the reference leaves out has gradient 0.
        a = torch.zeros(()) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("activation", sorted(SLOPES))
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_follow_their_formula(activation: str, bias: bool) -> None:
    part = DenseFFN(
        d_ff=24, activation=activation, bias=bias, gate_limit=0.7, gate_alpha=1.7, up_shift=1.0
    )
    for spelled in (part, replace(part, gate_limit=None, gate_alpha=1.0, up_shift=0.0)):
        dense, x = spelled.build(D_MODEL), some_tokens(2, 5)
        fill(dense)
        h = x @ dense.up.weight.T + (dense.up.bias if bias else 0)
        wanted = act(h, dense.activation) @ dense.down.weight.T + (dense.down.bias if bias else 0)
        torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_clamped_gate_is_that_of_gpt_oss() -> None:
    part = DenseFFN(d_ff=8, gate_limit=7.0, gate_alpha=1.702, up_shift=1.0)
    h = torch.linspace(-12, 12, 16).repeat(3, 1)
    gate, up = h[:, :8].clamp(max=7.0), h[:, 8:].clamp(-7.0, 7.0)
    wanted = (up + 1) * (gate * torch.sigmoid(1.702 * gate))
    torch.testing.assert_close(part.build_activation()(h), wanted)


def whole(part: FFN) -> Architecture:
    mixer = {"kind": "attention", "head_dim": 8}
    block = {"mixer": mixer, "ffn": part.plain()}
    return Architecture.parse({"vocab_size": 40, "d_model": D_MODEL, "blocks": [block]})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_parameters_of_any_fields_are_counted(seed: int) -> None:
    part = fields_of(seed)
    for width in (8, 40):
        cost, built = part.cost(width, 8), part.build(width)
        assert cost.params == sum(p.numel() for p in built.parameters())
        assert cost.active_params <= cost.params
        assert cost.weight_bytes == 2 * cost.params
        assert part.canonical().cost(width, 8) == cost


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_operations_of_any_fields_are_foreseen(seed: int) -> None:
    """With the rows of zero experts, and of those below their cut-off, that carry nothing."""
    architecture = whole(fields_of(seed))
    counted = count_flops(architecture.build(), torch.zeros(1, 12, dtype=torch.int64))
    assert 2 * counted.macs == architecture.pass_flops(12)


def test_zero_experts_cost_their_share_of_an_even_load() -> None:
    router = router_of(top_k=12)
    longcat = MoEFFN(n_experts=512, n_zero_experts=256, d_expert=64, router=router)
    plain = MoEFFN(n_experts=512, d_expert=64, router=replace(router, top_k=8))
    cost, wanted = longcat.cost(64, 8), plain.cost(64, 8)
    rows = 256 * 64  # of the router
    assert cost.active_params == wanted.active_params + rows
    assert cost.params == wanted.params + rows


def test_no_network_runs_for_a_zero_expert() -> None:
    moe = MoEFFN(n_experts=2, n_zero_experts=2, d_expert=8, router=router_of(top_k=1)).build(
        D_MODEL
    )
    fill(moe)
    moe.router.logits.weight.data.zero_()
    moe.router.logits.weight.data[3] = 1.0
    x = some_tokens(2, 5).abs()
    moe.experts.up.data.fill_(float("nan"))
    weights = moe.router(x.flatten(0, 1)).weights.view(2, 5, 1)
    torch.testing.assert_close(moe(x), x * weights)
    assert moe.routing.load.tolist() == [0, 0, 0, 10]


def test_zero_experts_take_no_room() -> None:
    """Capacity counts experts with a network; the dropped share is of their slots."""
    router = router_of(top_k=1, capacity_factor=0.5, normalize=False)
    moe = MoEFFN(n_experts=1, n_zero_experts=1, d_expert=8, router=router).build(D_MODEL)
    fill(moe)
    moe.router.logits.weight.data[0] = 0
    moe.router.logits.weight.data[1] = 0
    moe.router.logits.weight.data[1, 0] = 1.0
    x = some_tokens(1, 8).detach()
    x[0, :, 0] = torch.tensor([1.0, -1, 1, -1, -1, -1, 1, 1])  # 4 slots each; room ceil(0.5*8/2)
    moe(x)
    assert moe.routing.load.tolist() == [4, 4]
    assert moe.routing.dropped.item() == pytest.approx(0.5)


ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # Groups that leave all open, or are ranked by their best and as many as are chosen.
    ({"router": {"selection": {"kind": "top_k", "n_groups": 4, "top_groups": 4}}}, {}),
    ({"router": {"selection": {"kind": "top_k", "n_groups": 4, "top_groups": 9, "group_score": "top2_sum"}}}, {}),
    ({"router": {"selection": {"kind": "top_k", "n_groups": 4, "top_groups": 2}}}, {}),
    ({"router": {"selection": {"kind": "top_k", "n_groups": 8, "top_groups": 3, "group_score": "top2_sum"}}}, {}),
    ({"router": {"selection": {"kind": "top_k", "group_score": "top2_sum", "top_groups": 3}}}, {}),
    # A single weight is not divided by itself, more than one are.
    ({"router": {"top_k": 1, "normalize": False}}, {"router": {"top_k": 1}}),
    ({"router": {"normalize": True}}, {}),
    # relu(w x) = w relu(x).
    (
        {"activation": "relu", "router": {"weight_on": "input", "score": "sigmoid"}},
        {"activation": "relu", "router": {"score": "sigmoid"}},
    ),
    # All experts are chosen by every selection.
    (
        {"router": {"top_k": 8, "selection": "expert_choice", "allow_acausal": True}},
        {"router": {"top_k": 8}},
    ),
    (
        {"router": {"top_k": 8, "selection": "sinkhorn", "allow_acausal": True}},
        {"router": {"top_k": 8, "balance": "none"}},
    ),
    # Fields of what is not there.
    ({"router": {"allow_acausal": True}}, {}),
    ({"router": {"balance": {"kind": "bias_and_loss", "coef": 0.0}}}, {"router": {"balance": "bias"}}),
    ({"router": {"balance": {"kind": "bias_and_loss", "rate": 0.0}}}, {}),
    ({"shared_gate": True, "zero_kind": "constant", "d_shared": 32}, {}),
    ({"activation": "gelu", "gate_limit": 2.0, "up_shift": 1.0}, {"activation": "gelu"}),
    ({"activation": "reglu", "gate_alpha": 2.0}, {"activation": "reglu"}),
]  # fmt: skip


def spelled(fields: dict[str, Any]) -> MoEFFN:
    return tree.parse(FFN, {"kind": "moe", "n_experts": 8, "d_expert": 8} | fields)


@pytest.mark.parametrize("number", range(len(ALIKE)))
@pytest.mark.parametrize("train", [False, True])
def test_two_spellings_have_one_fingerprint_and_one_function(number: int, train: bool) -> None:
    one, other = (spelled(fields) for fields in ALIKE[number])
    assert one != other
    assert whole(one).fingerprint == whole(other).fingerprint
    first, second = one.build(D_MODEL), other.build(D_MODEL)
    fill(first)
    second.load_state_dict(
        {k: v for k, v in first.state_dict().items() if k in second.state_dict()}
    )
    x = some_tokens(2, 12)
    torch.manual_seed(0)
    y = first.train(train)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, second.train(train)(x), rtol=1e-4, atol=1e-4)


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"router": {"selection": {"kind": "top_k", "n_groups": 4, "top_groups": 1}}},
    {
        "router": {
            "selection": {
                "kind": "top_k",
                "n_groups": 4,
                "top_groups": 2,
                "group_score": "top2_sum",
            }
        }
    },
    {"router": {"selection": "noisy_top_k"}},
    {"router": {"selection": "threshold"}},
    {"router": {"selection": "expert_choice", "allow_acausal": True}},
    {"router": {"selection": "sinkhorn", "allow_acausal": True}},
    {"router": {"score": "relu"}},
    {"router": {"top_k": 1}},
    {"router": {"top_k": 1, "score": "relu"}},
    {"router": {"score": "sqrt_softplus"}},
    {"router": {"weight_on": "input"}},
    {"router": {"logits": {"kind": "linear", "add_bias": True}}},
    {"router": {"logits": {"kind": "linear", "hidden": 8}}},
    {"router": {"logits": {"kind": "linear", "jitter": 0.1}}},
    {"router": {"balance": {"kind": "aux_loss", "scope": "sequence"}}},
    {"router": {"balance": "importance_load"}},
    {"router": {"balance": "bias_and_loss"}},
    {"expert_bias": True},
    {"n_shared_experts": 1},
    {"n_shared_experts": 1, "shared_gate": True},
    {"d_latent": 8},
    {"n_zero_experts": 1},
    {"n_zero_experts": 1, "zero_kind": "zero"},
    {"n_zero_experts": 1, "zero_kind": "constant"},
    {"gate_limit": 7.0},
    {"gate_alpha": 1.5},
    {"up_shift": 1.0},
    {"activated_limit": 7.0},
    {"activated_limit": 7.0, "gate_limit": 7.0},
    {"activation": "geglu"},
    {"activation": "geglu_tanh"},
]


def test_different_fields_have_different_fingerprints() -> None:
    assert len({whole(spelled(fields)).fingerprint for fields in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"selection": {"kind": "top_k", "n_groups": 3, "top_groups": 1}},
            "n_groups (3) must divide the number of experts (8)",
        ),
        (
            {"selection": {"kind": "top_k", "n_groups": 4}, "top_k": 3},
            "top_k (3) must be at most the 2 experts of top_groups",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError) as error:
        spelled({"router": fields})
    assert message in str(error.value)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_any_fields_train(seed: int) -> None:
    """Finite output and gradients in training; every weight but the unused is reached."""
    model = whole(fields_of(seed)).build(seed=1).train()
    tokens = torch.arange(24).view(2, 12) * 5 % 40
    for _ in range(2):
        model.zero_grad()
        (model.loss(tokens, tokens.roll(-1, 1)) + model.auxiliary_loss()).backward()
        model.after_step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_memory_reads_the_best_of_all_pairs() -> None:
    """Lample et al., section 3.1: a search over all n^2 keys finds the same."""
    part = ProductKeyFFN(n_keys=5, d_key=8, n_heads=2, top_k=3)
    memory, x = part.build(D_MODEL), some_tokens(2, 4)
    fill(memory)
    y = memory(x).flatten(0, 1)
    for t, token in enumerate(x.flatten(0, 1)):
        wanted = torch.zeros(D_MODEL)
        for head in range(2):
            q = memory.query.weight[8 * head : 8 * head + 8] @ token
            first, second = memory.keys[2 * head], memory.keys[2 * head + 1]
            pairs = [torch.cat((first[i], second[j])) for i in range(5) for j in range(5)]
            best = (torch.stack(pairs) @ q).topk(3)
            wanted = wanted + F.softmax(best.values, dim=0) @ memory.values[best.indices]
        torch.testing.assert_close(y[t], wanted, rtol=1e-4, atol=1e-4)


def test_a_memory_counts_what_is_read_as_active() -> None:
    part = ProductKeyFFN(n_keys=10, d_key=8, n_heads=2, top_k=3)
    cost, memory = part.cost(D_MODEL, 8), part.build(D_MODEL)
    assert cost.params == sum(p.numel() for p in memory.parameters())
    assert cost.params - cost.active_params == 100 * D_MODEL - 2 * 3 * D_MODEL
