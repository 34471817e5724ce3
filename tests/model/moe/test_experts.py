"""The mixture of experts against all experts on all tokens, and what capacity drops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import router_of
from torch import Tensor

from moenas.model import DenseFFN, MoE, MoEFFN, Router
from moenas.model.moe.dispatch import sort_slots, within_capacity

D_MODEL = 16
ACTIVATIONS = ["swiglu", "geglu", "reglu", "gelu", "relu2"]


def build(seed: int = 0, **fields: object) -> MoE:
    moe = MoEFFN(**{"n_experts": 4, "d_expert": 8, **fields}).build(D_MODEL)
    assert isinstance(moe, MoE)
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return moe


def some_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    x = torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def one_expert(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    h = x @ up.T
    if activation in ("gelu", "relu2"):
        h = F.gelu(h) if activation == "gelu" else torch.relu(h) ** 2
    else:
        gate, value = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
        act = {"swiglu": F.silu, "geglu": F.gelu, "reglu": torch.relu}[activation]
        h = act(gate) * value
    return h @ down.T


def all_on_all(moe: MoE, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """Every expert on every token, then weighted by the weight or by 0."""
    choice = moe.router(x.flatten(0, 1), moe.balance.bias)
    weights = choice.weights if kept is None else choice.weights * kept
    table = torch.zeros(len(weights), moe.experts.n_experts)
    table = table.scatter(1, choice.experts, weights).view(*x.shape[:2], -1)
    y = torch.zeros_like(x)
    for e in range(moe.experts.n_experts):
        up, down = moe.experts.up[e].T, moe.experts.down[e].T
        y = y + table[..., e : e + 1] * one_expert(x, up, down, moe.experts.activation.name)
    if moe.shared is not None:
        shared = moe.shared
        y = y + one_expert(x, shared.up.weight, shared.down.weight, shared.activation.name)
    return y


def assert_same_gradients(moe: MoE, x: Tensor, y: Tensor, reference: Tensor) -> None:
    leaves = [x, *moe.parameters()]
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((y * seed).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((reference * seed).sum(), leaves)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    n_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    activation=st.sampled_from(ACTIVATIONS),
    score=st.sampled_from(["softmax", "sigmoid"]),
    shared=st.integers(0, 2),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
)
def test_the_mixture_is_all_experts_on_all_tokens(
    n_experts: int,
    top_k: int,
    activation: str,
    score: str,
    shared: int,
    shape: tuple[int, int],
) -> None:
    router = router_of(top_k=min(top_k, n_experts), score=score)
    moe = build(n_experts=n_experts, activation=activation, router=router, n_shared_experts=shared)
    x = some_tokens(*shape)
    y, reference = moe(x), all_on_all(moe, x)
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    assert_same_gradients(moe, x, y, reference)
    assert moe.routing.load.sum() == shape[0] * shape[1] * router.top_k


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_layer_is_one_expert(activation: str) -> None:
    dense = DenseFFN(d_ff=24, activation=activation).build(D_MODEL)
    for parameter in dense.parameters():
        parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    x = some_tokens(2, 5)
    wanted = one_expert(x, dense.up.weight, dense.down.weight, activation)
    torch.testing.assert_close(dense(x), wanted)


def first_come_first_served(
    experts: list[list[int]], n_experts: int, room: int
) -> list[list[bool]]:
    """One sequence, slot after slot."""
    taken = [0] * n_experts
    kept = []
    for row in experts:
        kept.append([])
        for e in row:
            kept[-1].append(taken[e] < room)
            taken[e] += 1
    return kept


@given(
    experts=st.integers(1, 4).flatmap(
        lambda k: st.lists(
            st.lists(st.permutations(range(5)).map(lambda p: p[:k]), min_size=6, max_size=6),
            min_size=1,
            max_size=4,
        )
    ),
    room=st.integers(0, 7),
)
def test_capacity_serves_each_sequence_in_order(experts: list[list[list[int]]], room: int) -> None:
    served = within_capacity(torch.tensor(experts), 5, room)
    assert served.tolist() == [first_come_first_served(rows, 5, room) for rows in experts]


@given(
    experts=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    dropped=st.sets(st.integers(0, 59)),
    multiple=st.sampled_from([1, 2, 8, 16]),
    top_k=st.sampled_from([1, 2]),
)
def test_rows_lie_together_by_expert_and_hold_each_slot_once(
    experts: list[int], dropped: set[int], multiple: int, top_k: int
) -> None:
    experts = experts[: len(experts) // top_k * top_k]
    kept = torch.tensor([i not in dropped for i in range(len(experts))])
    chosen = torch.tensor(experts).view(-1, top_k)
    slot, ends, empty, all_read = sort_slots(chosen, 5, kept.view_as(chosen), multiple)
    assert empty is not None
    rows = [s for s, e in zip(slot.tolist(), empty.flatten().tolist(), strict=True) if not e]
    assert sorted(rows) == [i for i in range(len(experts)) if kept[i]]
    start = 0
    for e, end in enumerate(ends.tolist()):
        assert (end - start) % multiple == 0
        held = [i for i in range(start, end) if not empty[i]]
        assert [slot[i].item() for i in held] == [
            i for i in range(len(experts)) if kept[i] and experts[i] == e
        ]
        start = end
    assert empty[start:].all()
    assert not all_read or start == len(slot)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_slots_without_room_add_nothing_in_value_or_gradient(factor: float) -> None:
    router = router_of(top_k=2, capacity_factor=factor)
    moe, x = build(router=router, n_experts=4), some_tokens(3, 10)
    y = moe(x)
    choice = moe.router(x.flatten(0, 1))
    room = math.ceil(factor * 2 * 10 / 4)
    sequences = choice.experts.view(3, 10, 2).tolist()
    kept = torch.tensor([first_come_first_served(rows, 4, room) for rows in sequences])
    reference = all_on_all(moe, x, kept.flatten(0, 1))
    assert 0 < moe.routing.dropped < 1
    assert moe.routing.load.sum() == 3 * 10 * 2
    assert moe.routing.dropped.item() == pytest.approx(1 - kept.float().mean().item())
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    assert_same_gradients(moe, x, y, reference)


def test_memory_that_was_never_written_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """grouped_mm may leave anything behind its last row, so fill that with NaN."""
    real = F.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, offs):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(a, b, offs)
            behind = torch.arange(len(a)).unsqueeze(-1) >= offs[-1]
            return real(a, b, offs=offs).masked_fill(behind, math.nan)

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            a, b, offs = ctx.saved_tensors
            behind = torch.arange(len(a)).unsqueeze(-1) >= offs[-1]
            with torch.enable_grad():
                a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
                grads = torch.autograd.grad(real(a, b, offs=offs), (a, b), g)
            return grads[0].masked_fill(behind, math.nan), grads[1], None

    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: Poisoned.apply(a, b, offs))
    moe = build(router=router_of(top_k=2, capacity_factor=0.25), n_experts=4)
    for dtype in (torch.float32, torch.bfloat16):
        x = some_tokens(3, 16).detach().to(dtype).requires_grad_()
        y = moe(x)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y.float().square().sum(), [x, *moe.parameters()]):
            assert gradient.isfinite().all()


def test_evaluation_drops_nothing() -> None:
    moe, x = build(router=router_of(top_k=2, capacity_factor=0.25)), some_tokens(2, 10)
    moe.eval()
    torch.testing.assert_close(moe(x), all_on_all(moe, x), rtol=1e-4, atol=1e-4)
    assert moe.routing.dropped == 0


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("length", [3, 81], ids=["rows as they are", "rows rounded up"])
def test_bfloat16_agrees_with_float32(length: int, capacity_factor: float | None) -> None:
    router = router_of(top_k=2, capacity_factor=capacity_factor)
    moe = build(router=router, n_shared_experts=1)
    x = some_tokens(
        2, length
    ).bfloat16()  # the same tokens for both, so that they route in the same way
    full, half = moe(x.float()), moe(x)
    assert half.dtype == torch.bfloat16
    assert (full - half).norm() < 0.02 * full.norm()
    gradients = [
        torch.autograd.grad(y.float().square().sum(), moe.experts.up)[0] for y in (full, half)
    ]
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


def test_a_gradient_that_is_the_same_everywhere_is_fine() -> None:
    moe, x = build(), some_tokens(2, 6)
    moe(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_more_chosen_than_there_are_is_refused() -> None:
    reason = MoEFFN(n_experts=4, d_expert=8, router=router_of(top_k=8)).invalid()
    assert reason == "top_k (8) must be at most n_experts (4)"


def test_shared_experts_are_one_wide_expert() -> None:
    two = MoEFFN(n_experts=4, d_expert=8, n_shared_experts=2, d_shared=16)
    one = MoEFFN(n_experts=4, d_expert=8, n_shared_experts=1, d_shared=32)
    assert two.canonical() == one.canonical() == replace(one, router=Router().canonical())
    assert two.cost(16, 1) == one.cost(16, 1)
    unused = MoEFFN(n_experts=4, d_expert=8, d_shared=16)
    assert unused.canonical() == MoEFFN(n_experts=4, d_expert=8).canonical()
    default_width = MoEFFN(n_experts=4, d_expert=8, n_shared_experts=1)
    assert default_width.canonical().d_shared == 8


ROUTERS = {
    "plain": router_of(top_k=2),
    "capacity": router_of(top_k=2, capacity_factor=0.5),
    "groups": router_of(
        top_k=2,
        selection={"kind": "top_k", "n_groups": 2, "top_groups": 1},
        score="sigmoid",
        balance="bias",
    ),
    "noise": router_of(top_k=2, selection="noisy_top_k", logits={"kind": "linear", "jitter": 0.01}),
    "threshold": router_of(top_k=2, selection="threshold"),
    "sinkhorn": router_of(top_k=1, selection="sinkhorn", allow_acausal=True),
    "expert choice": router_of(top_k=2, selection="expert_choice", allow_acausal=True),
}


def one_step(moe: MoE, x: Tensor) -> Tensor:
    y = moe(x)
    torch.autograd.backward((y.float().square().mean() + moe.auxiliary_loss(),))
    moe.after_step()
    return y


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("zeros", [0, 2])
def test_a_step_reads_no_value_of_a_tensor(router: Router, zeros: int) -> None:
    """On the meta device there is none: .item(), a mask as an index or a loop over counts raise."""
    with torch.device("meta"):
        moe = MoEFFN(
            n_experts=4, d_expert=8, router=router, expert_bias=True, n_zero_experts=zeros
        ).build(D_MODEL)
        x = torch.empty(2, 24, D_MODEL, dtype=torch.bfloat16, requires_grad=True)
    assert isinstance(moe, MoE)
    y = one_step(moe, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert all(p.grad is not None for p in [x, moe.experts.up, moe.experts.down])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "noise"])
def test_a_step_captured_in_a_cuda_graph_is_the_step(name: str) -> None:
    """Without noise: each replay of a graph draws another."""
    moe = MoEFFN(n_experts=8, d_expert=32, router=ROUTERS[name]).build(64).cuda()
    torch.manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.2)
    batches = torch.randn(4, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    x = batches[0].clone().requires_grad_()
    state = {name: value.clone() for name, value in moe.state_dict().items()}

    def step() -> Tensor:
        for leaf in (x, *moe.parameters()):
            leaf.grad = None
        return one_step(moe, x)

    # Autograd keeps the stream of a leaf's first use, so warm-up, capture and all that follows
    # stay on one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = step().detach()
        leaves = [x, *moe.parameters()]
        held = [leaf.grad for leaf in leaves]
        for batch in batches:
            with torch.no_grad():
                x.copy_(batch)
                moe.load_state_dict(state)
            graph.replay()
            replayed = [captured.clone(), *(g.clone() for g in held if g is not None)]
            moe.load_state_dict(state)
            wanted = [step().detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
            for a, b in zip(replayed, wanted, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "noise"])
def test_a_gpu_is_as_close_to_float32_in_bfloat16_as_a_cpu(name: str) -> None:
    """Of nine tokens in ten: of two experts that nearly tie, each device may take another."""
    generator = torch.Generator().manual_seed(0)
    moe = MoEFFN(n_experts=8, d_expert=32, router=ROUTERS[name]).build(64)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    tokens = torch.randn(2, 64, 64, generator=generator).bfloat16()

    def outputs(device: str, dtype: torch.dtype) -> list[Tensor]:
        x = tokens.to(device, dtype, copy=True).requires_grad_()
        y = one_step(copy.deepcopy(moe).to(device), x)
        assert x.grad is not None
        return [part.detach().cpu().float() for part in (y, x.grad)]

    exact = outputs("cpu", torch.float32)
    rounded = [outputs(device, torch.bfloat16) for device in ("cpu", "cuda")]
    for right, on_cpu, on_gpu in zip(exact, *rounded, strict=True):
        errors = [(y - right).norm(dim=-1).flatten().quantile(0.9) for y in (on_cpu, on_gpu)]
        assert errors[1] < 1.5 * errors[0]
        assert errors[0] < 0.05 * right.norm(dim=-1).mean()
