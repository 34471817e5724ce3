"""What parts compute on CUDA is what they compute on a CPU; here both on the CPU, in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import NoCollisions, cuda_forms
from routers import router_of
from torch import Tensor, nn

from moenas.evaluate.causality import _grouped, _InFloat64
from moenas.model import (
    AttentionMixer,
    GatedDeltaMixer,
    KimiDeltaMixer,
    LatentAttentionMixer,
    LightningAttentionMixer,
    Mamba2Mixer,
    MambaMixer,
    Mixer,
    MoAMixer,
    MoE,
    MoEFFN,
    RoutedLayer,
)
from moenas.model.layer_inputs import LayerInputs, run_ffn
from moenas.model.mixers.position_bias import AlibiBias, T5Bias
from moenas.model.mixers.softmax_attention import attended_on_cuda
from moenas.model.moe import dispatch
from moenas.model.moe.dispatch import (
    grouped,
    inverse,
    smallest_integer,
    sort_slots,
    within_capacity,
)

D_MODEL, BATCH, LENGTH = 16, 3, 20
NUMBERS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 7

ROUTERS = {
    "plain": router_of(top_k=2),
    "one": router_of(top_k=1),
    "normalised": router_of(top_k=3, normalize=True, expert_scale=True),
    "capacity": router_of(
        top_k=2, capacity_factor=0.5, balance={"kind": "aux_loss", "scope": "sequence"}
    ),
    "bias and loss": router_of(top_k=2, balance="bias_and_loss", score="sigmoid"),
    "groups": router_of(
        top_k=2,
        selection={"kind": "top_k", "n_groups": 2, "top_groups": 1},
        score="sigmoid",
        balance="bias",
    ),
    "top p": router_of(top_k=3, selection={"kind": "top_k", "top_p": 0.6}),
    "importance": router_of(top_k=2, balance="importance_load"),
    "sparsemixer": router_of(top_k=2, selection={"kind": "top_k", "sparsemixer_eps": 0.1}),
    "noise": router_of(top_k=2, selection="noisy_top_k", logits={"kind": "linear", "jitter": 0.01}),
}
BY_BATCH = {
    "threshold": router_of(top_k=2, selection="threshold"),
    "hash": router_of(top_k=2, selection="hash", score="uniform", expert_scale=True),
    "sinkhorn": router_of(top_k=1, selection="sinkhorn", allow_acausal=True),
    "base": router_of(top_k=1, selection="base", allow_acausal=True),
    "expert choice": router_of(
        top_k=2, selection="expert_choice", allow_acausal=True, balance="importance_load"
    ),
    "expert choice, normalised": router_of(
        top_k=2, selection="expert_choice", allow_acausal=True, normalize=True, expert_scale=True
    ),
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"expert_bias": True},
    "zero experts": {"n_zero_experts": 2, "zero_kind": "constant"},
    "latent": {"d_latent": 8, "expert_bias": True, "n_zero_experts": 2},
}


class _Poisoned(torch.autograd.Function):
    """A grouped product as on CUDA: rows behind the last end are not written, in no direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, stack, ends)
        y = _grouped(rows, stack, ends)
        y[int(ends[-1]) :] = math.nan
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        rows, stack, ends = ctx.saved_tensors
        end = int(ends[-1])
        with torch.enable_grad():
            a, b = rows[:end].detach().requires_grad_(), stack.detach().requires_grad_()
            da, db = torch.autograd.grad(_grouped(a, b, ends), (a, b), grads[0][:end])
        return torch.cat((da, torch.full_like(rows[end:], math.nan))), db, None


@pytest.fixture(autouse=True)
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(rows: Tensor, stack: Tensor, *, offs: Tensor) -> Any:
        return _Poisoned.apply(rows, stack, offs)

    monkeypatch.setattr(F, "grouped_mm", product)


def outcome(moe: RoutedLayer, x: Tensor) -> dict[str, Tensor]:
    """Return what a step computes: output, load, losses, gradients."""
    moe.zero_grad()
    x.grad = None
    torch.manual_seed(2)
    with _InFloat64():
        y = run_ffn(moe, x, LayerInputs(NUMBERS))
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        torch.autograd.backward((loss + 10 * moe.auxiliary_loss(),))
    tensors = {"y": y, "load": moe.routing.load, "loss": moe.auxiliary_loss(), "grad x": x.grad}
    tensors |= {f"grad {n}": p.grad for n, p in moe.named_parameters()}
    return {name: x.detach().clone() for name, x in tensors.items() if x is not None}


def assert_alike(moe: nn.Module) -> None:
    """Both forms give the same, and the form for CUDA adds nothing up in an unknown order."""
    assert isinstance(moe, RoutedLayer)
    torch.manual_seed(0)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.3)
    moe.double()
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64).requires_grad_()
    plain = outcome(moe, x)
    with cuda_forms(), NoCollisions():
        other = outcome(moe, x)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("name", "layer", "weight_on"),
    [
        (name, layer, weight_on)
        for i, name in enumerate(ROUTERS | BY_BATCH)
        for layer in LAYERS
        for j, weight_on in enumerate(("input", "output"))
        if layer in ("plain", "bias") or i % 2 == j
    ],
)
def test_experts(name: str, layer: str, weight_on: Any) -> None:
    router = replace((ROUTERS | BY_BATCH)[name], weight_on=weight_on)
    record = MoEFFN(n_experts=6, d_expert=24, router=router, **LAYERS[layer])
    assert record.invalid() is None
    assert_alike(record.build(D_MODEL))


@pytest.mark.parametrize("weight_on", ["input", "output"])
@pytest.mark.parametrize("name", ROUTERS)
def test_heads(name: str, weight_on: Any) -> None:
    router = replace(ROUTERS[name], weight_on=weight_on)
    record = MoAMixer(n_experts=6, head_dim=8, n_kv_heads=2, router=router)
    assert record.invalid() is None
    assert_alike(record.build(D_MODEL))


def test_the_form_for_a_cpu_adds_up_at_one_place() -> None:
    """So the test above would see it."""
    moe = MoEFFN(n_experts=6, d_expert=24, router=router_of(top_k=2)).build(D_MODEL).double()
    assert isinstance(moe, MoE)
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    with NoCollisions(), pytest.raises(AssertionError, match="adds several numbers at one place"):
        outcome(moe, x)


@pytest.mark.parametrize("n_experts", [6, 255, 256, 32_767, 32_768])
def test_narrow_keys_sort_alike(n_experts: int) -> None:
    torch.manual_seed(0)
    experts = torch.randint(n_experts, (50, 4))
    kept = torch.rand(50, 4) < 0.7
    plain, room = (
        sort_slots(experts, n_experts, kept, 1),
        within_capacity(experts[None], n_experts, 1),
    )
    with cuda_forms():
        other = sort_slots(experts, n_experts, kept, 1)
        assert torch.equal(within_capacity(experts[None], n_experts, 1), room)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], other[:3], strict=True))
    assert torch.equal(other.slot[inverse(other.slot)], torch.arange(200))
    assert torch.iinfo(smallest_integer(n_experts)).max >= n_experts


@pytest.mark.parametrize("n_experts", [1, 3, 4, 5, 7, 13])
def test_many_experts_are_several_grouped_products(
    n_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MOST_GROUPS", 4)
    sizes: list[int] = []
    product = F.grouped_mm

    def counted(rows: Tensor, stack: Tensor, *, offs: Tensor) -> Tensor:
        sizes.append(len(stack))
        return product(rows, stack, offs=offs)

    torch.manual_seed(0)
    rows = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    stack = torch.randn(n_experts, 8, 16, dtype=torch.float64, requires_grad=True)
    ends = torch.randint(35, (n_experts,)).sort().values.int()
    weight = torch.randn(40, 16, dtype=torch.float64)[: int(ends[-1])]
    outputs = []
    for form in (lambda: _grouped(rows, stack, ends), lambda: grouped(rows, stack, ends)):
        with cuda_forms(), monkeypatch.context() as patch:
            patch.setattr(F, "grouped_mm", counted)
            y = form()[: len(weight)]
        gradients = torch.autograd.grad((y * weight).sum(), (rows, stack))
        outputs.append((y, gradients[0][: len(weight)], gradients[1]))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert max(sizes) <= 4
    assert sum(sizes) >= n_experts


def test_an_expert_without_tokens_gets_no_gradient_where_torch_writes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
            return _grouped(rows, stack, ends)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor, None]:
            return None, torch.full((3, 8, 16), math.nan), None

    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: Careless.apply(a, b, offs))
    monkeypatch.setattr(dispatch, "gradient_unwritten", lambda device: True)
    stack = torch.randn(3, 8, 16, requires_grad=True)
    with cuda_forms():
        y = grouped(torch.randn(5, 8), stack, torch.tensor([2, 2, 5], dtype=torch.int32))
    (gradient,) = torch.autograd.grad(y.sum(), stack)
    assert gradient.isnan().flatten(1).any(dim=1).tolist() == [True, False, True]
    assert gradient[1].eq(0).all()


# --- attention ---------------------------------------------------------------------------------

MIXERS: dict[str, Mixer] = {
    "attention": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2),
    "window": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, window=5),
    "chunk": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=4, chunk=6),
    "other values": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, v_head_dim=16),
    "sinks": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, window=5, sinks=True),
    "softcap": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, softcap=3.0),
    "alibi": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, position_bias=AlibiBias()),
    "t5": AttentionMixer(head_dim=8, n_heads=4, n_kv_heads=2, position_bias=T5Bias()),
    "latent": LatentAttentionMixer(n_heads=3, kv_rank=8, nope_dim=8, rope_dim=2, v_dim=16),
    "latent sinks": LatentAttentionMixer(
        n_heads=3, kv_rank=8, nope_dim=8, rope_dim=2, v_dim=16, sinks=True
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are the same through the function whose sums have one order."""
    modes = []

    def seen(*args: Any) -> Any:
        modes.append(torch.get_deterministic_debug_mode())
        return grad(*args)

    grad = torch.autograd.grad
    torch.manual_seed(0)
    mixer = MIXERS[name].build(D_MODEL)
    for parameter in mixer.parameters():
        parameter.data.normal_(0, 0.3)
    mixer.double()
    x = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    outputs = []
    for form in (nullcontext(), cuda_forms()):
        with form, _InFloat64():
            with torch.no_grad():
                quick = mixer(x)
            y = mixer(x)
            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", seen)
                y.square().sum().backward()
        outputs.append([quick, y.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert set(modes) == ({2} if name != "softcap" else set())
    assert torch.get_deterministic_debug_mode() == 0


SCANS: dict[str, Mixer] = {
    "mamba": MambaMixer(d_inner=16, d_state=4, inner_norm=True),
    "mamba2": Mamba2Mixer(n_heads=4, head_dim=8, d_state=4, n_state_groups=2),
    "gated_delta": GatedDeltaMixer(n_heads=2, key_dim=8, value_dim=8),
    "kimi_delta": KimiDeltaMixer(n_heads=2, key_dim=8, value_dim=8),
    "lightning": LightningAttentionMixer(n_heads=2, head_dim=8),
}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_is_computed_again_in_place_of_kept(name: str) -> None:
    """Values and gradients are the same to the last bit, and what a pass keeps is less."""
    torch.manual_seed(0)
    mixer = SCANS[name].build(D_MODEL)
    for parameter in mixer.parameters():
        parameter.data.normal_(0, 0.3)
    x = torch.randn(2, 64, D_MODEL, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    outputs, kept = [], []
    for form in (nullcontext(), cuda_forms()):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with form:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = mixer(x)
            kept.append(sum(sizes.values()))
            outputs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            with torch.no_grad():
                assert torch.equal(mixer(x), y)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize(
    ("dtype", "masked", "width", "shares"),
    [
        (torch.bfloat16, False, 16, True),
        (torch.bfloat16, True, 16, False),
        (torch.float32, False, 16, False),
        (torch.bfloat16, False, 24, False),
    ],
    ids=["plain", "masked", "float32", "other values"],
)
def test_key_value_heads_are_shared_where_a_kernel_can(
    dtype: torch.dtype, masked: bool, width: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa, seen = F.scaled_dot_product_attention, []

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Any, **how: Any) -> Tensor:
        seen.append((k.shape[1], how["enable_gqa"], q.shape[-1] % 8, v.shape[-1] % 8))
        return sdpa(q, k, v, mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    q, k, v = (torch.randn(2, h, 6, c, dtype=dtype) for h, c in ((4, 10), (2, 10), (2, width - 6)))
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masked else None
    y = attended_on_cuda(q, k, v, mask, not masked, 0.5)[..., : width - 6]
    plain = sdpa(q, k, v, mask, is_causal=not masked, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(y, plain, rtol=1e-2, atol=1e-2)
    assert seen == [(2, True, 0, 0) if shares else (4, False, 0, 0)]
