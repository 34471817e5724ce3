"""Mixtures of attention heads: explicit sums, capacity, causality, and routing that is watched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from exact import check_cost, check_gradients, check_spellings
from routers import router_of
from torch import Tensor
from wide_space import stir

from moenas.errors import SpaceError
from moenas.evaluate.causality import find_leaks
from moenas.evaluate.routing_stats import RoutingAccumulator
from moenas.model import AttentionMixer, MoA, MoAMixer, Router
from moenas.model.architecture import Architecture, Model
from moenas.records import Plain
from moenas.testing.parts import check_part

D_MODEL = 16
HEADS: Plain = {"kind": "moa", "n_experts": 4, "head_dim": 8, "n_kv_heads": 2}
NETWORKS: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8}


def architecture(mixer: Plain, ffn: Plain | None = None) -> Architecture:
    blocks: list[Plain] = [{"mixer": mixer}, {"ffn": ffn or NETWORKS}]
    return Architecture.parse({"vocab_size": 40, "d_model": D_MODEL, "blocks": blocks})


def stirred(architecture: Architecture) -> Model:
    model = architecture.build(seed=1).eval()
    stir(model, 2)
    return model


def text(batch: int = 2, length: int = 20) -> Tensor:
    return torch.arange(batch * length).view(batch, length) * 7 % 40


def turned(x: Tensor, position: int) -> Tensor:
    """RoFormer, eq. 34, of one vector with pairs (i, i + C / 2)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def textbook(layer: MoA, x: Tensor, router: Router) -> Tensor:
    """Zhang et al., eq. 3 to 6, of one sequence (S, D) in float64, token by token."""
    x = x.double()
    experts = layer.experts
    kv = (x @ layer.attention.keys.weight.double().T).view(len(x), 2, 2, 8)  # keys, then values
    out = torch.zeros_like(x)
    for now, token in enumerate(x):
        scores = (layer.router.logits.weight.double() @ token).softmax(-1)
        chosen = scores.topk(router.top_k).indices.tolist()
        whole = sum(scores[e] for e in chosen) if router.normalizes else 1.0
        for e in chosen:
            weight = scores[e] / whole * router.scale
            query = (token @ experts.query[e].double()).view(2, 8)
            query = query * weight if router.weight_on == "input" else query
            heads = []
            for head in range(2):
                q = turned(query[head], now)
                keys = torch.stack([turned(kv[t, 0, head], t) for t in range(now + 1)])
                shares = (keys @ q / math.sqrt(8)).softmax(-1)
                heads.append(shares @ kv[: now + 1, 1, head])
            y = torch.cat(heads) @ experts.out[e].double()
            out[now] += y if router.weight_on == "input" else weight * y
    return out if layer.bias is None else out + layer.bias.double()


@torch.no_grad()
@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ({}, {}),
        ({"top_k": 1}, {"out_bias": True}),
        ({"top_k": 3, "normalize": False, "scale": 2.0}, {}),
        ({"top_k": 2, "weight_on": "input"}, {}),
    ],
    ids=["two of four", "one and a bias", "three with a scale", "weights on queries"],
)
def test_the_layer_is_the_textbook_formula(router: Plain, fields: Plain) -> None:
    mixer = HEADS | {"router": router} | fields
    layer: Any = stirred(architecture(mixer)).blocks[0].mixer
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(3))
    wanted = torch.stack([textbook(layer, sequence, router_of(**router)) for sequence in x])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
    cache = layer.new_cache(2, 9)
    parts = [layer(piece, cache) for piece in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_expert_is_plain_attention() -> None:
    """Its weight is 1: the softmax over one expert."""
    one = MoAMixer(n_experts=1, head_dim=8, n_kv_heads=2, router=router_of(top_k=1))
    plain = AttentionMixer(head_dim=8, n_heads=2)
    layer, attention = one.build(D_MODEL), plain.build(D_MODEL)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    rows = layer.experts.query[0].T, layer.attention.keys.weight
    attention.load_state_dict({"qkv.weight": torch.cat(rows), "out.weight": layer.experts.out[0].T})
    x = torch.randn(2, 12, D_MODEL, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(x), attention(x), rtol=1e-4, atol=1e-5)


def test_a_slot_without_room_adds_nothing() -> None:
    """With room for one slot in eight, most tokens get the bias alone, and none looks ahead."""
    mixer = HEADS | {"router": {"top_k": 1, "capacity_factor": 0.125}, "out_bias": True}
    model = stirred(architecture(mixer)).train()
    layer: Any = model.blocks[0].mixer
    x = torch.randn(1, 32, D_MODEL, generator=torch.Generator().manual_seed(3))
    y = layer(x)
    experts = layer.routing.choice.experts.flatten().tolist()
    first = {e: experts.index(e) for e in set(experts)}
    kept = torch.tensor([first[e] == i for i, e in enumerate(experts)])
    assert torch.equal((y[0] - layer.bias).abs().sum(-1) > 1e-6, kept)
    assert layer.routing.dropped.item() == pytest.approx(1 - len(first) / 32)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


ROUTERS: dict[str, Plain] = {
    "plain": {},
    "capacity": {"capacity_factor": 0.5, "weight_on": "input"},
    "noise": {"selection": "noisy_top_k", "top_k": 3, "balance": "importance_load"},
    "bias": {"balance": "bias", "score": "sigmoid", "top_k": 1},
    "groups": {"selection": {"kind": "top_k", "n_groups": 2, "top_groups": 1}, "top_k": 1},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_exact_and_causal(name: str) -> None:
    fields: Plain = (
        {"rope": {"partial_rotary_factor": 0.5}, "window": 5}
        if name == "noise"
        else {"out_bias": True}
    )
    parsed = architecture(HEADS | {"router": ROUTERS[name]} | fields)
    for length in (12, 31):
        check_cost(parsed, length)
    check_gradients(parsed, 31)
    check_spellings(parsed.plain(), 1)
    assert find_leaks(parsed.build(seed=0), text(9, 40), {5}) == []


def test_the_contract_of_parts_holds() -> None:
    check_part(MoAMixer, 5)


def test_heads_are_balanced_and_watched_as_networks_are() -> None:
    """Loads, losses and biases of the mixer's experts, under the number of its block."""
    router = {"balance": {"kind": "bias_and_loss", "rate": 0.1}, "score": "sigmoid"}
    model = architecture(HEADS | {"router": router}).build(seed=1).train()
    layers = model.moe_layers()
    assert [(i, type(layer).__name__) for i, layer in layers] == [(0, "MoA"), (1, "MoE")]
    meter = RoutingAccumulator(layers)
    model.loss(text(), text().roll(-1, 1))
    meter.add()
    assert [reading.load.sum().item() for reading in meter.read()] == [80, 80]
    losses = [layer.auxiliary_loss() for _, layer in layers]
    torch.testing.assert_close(model.auxiliary_loss(), losses[0] + losses[1])
    assert losses[0] > 0
    before = model.blocks[0].mixer.balance.bias.clone()
    model.after_step()
    assert (model.blocks[0].mixer.balance.bias - before).abs().max() > 0.01


def test_heads_and_networks_stay_in_two_blocks() -> None:
    """Loads are known by the number of a block; beside a plain network they join one block."""
    apart = architecture(HEADS)
    assert len(apart.canonical().layers) == 2
    assert len(architecture(HEADS, {"kind": "dense", "d_ff": 8}).canonical().layers) == 1
    with pytest.raises(SpaceError, match="give the mixer a block of its own"):
        Architecture.parse(
            {"vocab_size": 9, "d_model": 16, "blocks": [{"mixer": HEADS, "ffn": NETWORKS}]}
        )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router": {"top_k": 5}}, r"top_k \(5\) must be at most n_experts \(4\)"),
        ({"router": {"selection": "hash"}}, "selection: 'hash' is not for heads; take 'top_k'"),
        (
            {"router": {"selection": {"kind": "top_k", "n_groups": 3}}},
            r"n_groups \(3\) must divide the number of experts \(4\)",
        ),
    ],
)
def test_routers_that_do_not_fit_are_refused(fields: Plain, reason: str) -> None:
    with pytest.raises(SpaceError, match=reason):
        architecture(HEADS | fields)
