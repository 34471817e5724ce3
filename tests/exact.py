"""What must hold of any architecture: cost, cache, gradients, spellings, neighbours.

The default run takes 60 points, the slow one 5,000: drawn by number, so that a failure names one.
"""

from __future__ import annotations

import random
import traceback
from typing import Any

import torch
from counter import count_on_meta
from wide_space import (
    Noted,
    carry,
    changed,
    difference,
    labels,
    point,
    reading_alike,
    respelled,
    stir,
    tokens_of,
    trail,
)

from moenas.evaluate.flops import count_flops
from moenas.model import KVCache, MoE, MoEFFN, RoutedLayer, StateCache
from moenas.model.architecture import Architecture, Model
from moenas.model.mixers.block_indexer import BlockSelection
from moenas.model.mixers.token_indexer import IndexedCache, IndexedSelection
from moenas.model.moe.scores import Relu
from moenas.records import Plain
from moenas.testing.parts import _nothing_uninitialised

SHARDS = 100
PER_SHARD = 50
"""Valid points; 5,000 in all."""
SHORT = 12
LENGTHS = (SHORT, 31, 67)
"""Tokens of a sequence: a whole chunk, no whole capacity, and no whole number of chunks."""


# --- what must hold of a point ---------------------------------------------------------------------


def check_cost(architecture: Architecture, length: int) -> None:
    """Parameters, operations by both counters, and the growth of the cache are as computed."""
    cost = architecture.cost(length)
    hollow = architecture.build("meta").eval()
    assert cost.params == sum(p.numel() for p in hollow.parameters())
    assert cost.weight_bytes == 2 * cost.params
    assert 0 < cost.active_params <= cost.params
    foreseen = architecture.pass_flops(length)
    assert count_on_meta(hollow, 1, length) == foreseen
    model = architecture.build().eval()
    counted = count_flops(model, torch.zeros(1, length, dtype=torch.int64))
    assert 2 * counted.macs == foreseen
    if no_row_is_idle(architecture, length):
        assert 0 <= cost.flops_per_token * length - foreseen < length * len(architecture.layers)
    check_cache(architecture, model)


def no_row_is_idle(architecture: Architecture, length: int) -> bool:
    """Whether every slot of a mixture meets one network, so that only roundings are surplus.

    There is no sink either, because the cost leaves out its key.
    """
    if any(getattr(layer.mixer, "sinks", False) for layer in architecture.layers):
        return False
    mixtures = [p for x in architecture.layers for p in x.parts.values() if isinstance(p, MoEFFN)]
    return all(
        part.n_zero_experts == 0
        and part.router.selection.slots(part.router.top_k, length, part.n_choices)
        == part.router.top_k * length
        for part in mixtures
    )


@torch.no_grad()
def check_cache(architecture: Architecture, model: Model) -> None:
    """Keys and values grow by what the cost says, and states do not grow."""
    states = []
    for tokens in (SHORT, 2 * SHORT):
        cache = model.new_cache(1, tokens)
        model(torch.zeros(1, tokens, dtype=torch.int64), cache, dtype=torch.bfloat16)
        held = [c for c in cache if isinstance(c, KVCache)]
        of_indexers = [c.index for c in held if isinstance(c, IndexedCache)]
        grown = sum(
            part.nbytes
            for c in (*held, *of_indexers)
            for part in (c.keys, c.values)
            if part is not None
        )
        assert grown == tokens * architecture.cost(tokens).kv_bytes_per_token
        rest = [c for c in cache if isinstance(c, StateCache)]
        keeping = [x.mixer for x in architecture.layers if x.mixer is not None]
        keeping = [mixer for mixer in keeping if getattr(mixer, "kv_source", None) is None]
        assert len(held) + len(rest) == len(keeping)
        parts = [part for c in rest for part in (c.before, c.state)]
        states.append([None if part is None else part.shape for part in parts])
    assert states[0] == states[1]


def check_gradients(architecture: Architecture, length: int) -> None:
    """Forward is finite and, in training, every parameter that took part has a gradient."""
    model = architecture.build(seed=1)
    stir(model, 2)
    tokens = tokens_of(architecture, length)
    with torch.no_grad():
        assert model.eval()(tokens).isfinite().all()
    logits = model.train()(tokens)
    assert logits.isfinite().all()
    torch.manual_seed(0)
    (model.loss(tokens, tokens.roll(-1, 1)) + model.auxiliary_loss()).backward()
    idle = unreached(architecture, model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name in idle or parameter.grad.any(), name
    for _, moe in model.moe_layers():
        check_expert_gradients(moe)


def unreached(architecture: Architecture, model: Model) -> set[str]:
    """Return the parameters whose gradient may be 0 in a batch.

    Time steps below their floor; what only a zero expert reads that no token went to; experts whose
    weights are all 0, as those of a relu can be; and a router whose scores do not depend on its
    logits: of one expert, they are always 1.
    """
    names = set[str]()
    for i, layer in enumerate(architecture.layers):
        if getattr(layer.mixer, "dt_floor", 0.0):
            names.add(f"blocks.{i}.mixer.dt_bias")
    for name, module in model.named_modules():
        # Of the first token there is no other key.
        if isinstance(module, IndexedSelection | BlockSelection):
            names |= {f"{name}.{n}" for n, _ in module.named_parameters()}
        if not isinstance(module, RoutedLayer):
            continue
        load = module.routing.load
        relu = isinstance(module.router.score, Relu)
        if relu or not load[module.experts.n_experts :].any():
            names |= {f"{name}.zero.mix", f"{name}.zero.vector"}
        if relu or not load[: module.experts.n_experts].any():
            names |= {f"{name}.experts.{n}" for n, _ in module.experts.named_parameters()}
        if len(load) == 1 or not load.any():
            names |= {f"{name}.router.{n}" for n, _ in module.router.named_parameters()}
    return names


def check_expert_gradients(moe: MoE) -> None:
    """An expert that no token went to in this batch has gradient 0."""
    load = moe.routing.load[: moe.experts.n_experts]
    for name, parameter in moe.experts.named_parameters():
        if len(parameter) == len(load) and "enter" not in name and "leave" not in name:
            assert not parameter.grad[load == 0].any(), name


def check_spellings(plain: Plain, seed: int) -> None:
    """Order of keys, defaults and number types do not matter, and canonical() changes nothing."""
    architecture = Architecture.parse(plain)
    other = Architecture.parse(respelled(architecture, random.Random(seed)))
    assert other == architecture
    canonical = architecture.canonical()
    assert canonical.canonical() == canonical
    assert other.fingerprint == canonical.fingerprint == architecture.fingerprint
    for length in LENGTHS:
        assert canonical.cost(length) == architecture.cost(length)
        assert canonical.pass_flops(length) == architecture.pass_flops(length)
    assert_same_function(architecture, canonical)


def assert_same_function(one: Architecture, other: Architecture) -> None:
    """Both start from the same weights, and compute and train in the same way from any.

    Where two feed-forward layers are written as one or change places, weights are carried over, and
    logits and losses are compared. Two spellings may round differently, and a rounding can carry a
    unit over the kink of a relu or a token to another expert: a difference counts if it shows from
    other weights, too.
    """
    models = [architecture.build(seed=3) for architecture in (one, other)]
    assert models[0].n_residual_branches == models[1].n_residual_branches
    moved = feed_forward(one) != feed_forward(other)
    if not moved:
        first, second = (
            {labels(model)[name]: p for name, p in model.named_parameters()} for model in models
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    outputs = []
    for seed in (4, 5):
        trails = []
        for architecture in (one, other):
            model, canonical = architecture.build(seed=3), architecture.canonical().build(seed=3)
            stir(canonical, seed)
            carry(architecture, model, canonical)
            trails.append(trail(model, 16))
        if moved:
            trails = [{k: v for k, v in t.items() if k[2:] in ("logits", "loss")} for t in trails]
        outputs.append(difference(*trails, 2e-3))
        if outputs[-1] is None:
            return
    raise AssertionError(f"two functions share a fingerprint: they differ in {outputs}")


def feed_forward(architecture: Architecture) -> list[Any]:
    """Return the canonical feed-forward layers and shortcuts in their order."""
    layers = [layer for layer in architecture.layers if layer.ffn is not None]
    parts = [(layer.ffn, layer.shortcut) for layer in layers]
    return [tuple(part and reading_alike(part) for part in pair) for pair in parts]


MAY_HIDE = {
    "norm_eps": "too small beside the activations",
    "inner_eps": "too small beside the activations",
    "norm_position": "a norm of what is normed already",
    "capacity_factor": "no expert is full in these batches",
    "normalize": "a norm after the experts takes the factor out",
    "scale": "a norm after the experts takes the factor out",
    "weight_on": "a norm after the experts takes the factor out",
    "balance": "the bias moves too little to change a choice",
    "rate": "the bias moves too little to change a choice",
    "coef": "the load is even in these batches",
    "scope": "the load is even in these batches",
    "selection": "all experts are below their cut-offs, or none",
    "zero_kind": "no token goes to such an expert",
    "dt_floor": "no time step is that short",
    "slower_by_depth": "the first layer keeps its exponents",
}
"""Fields whose change may show in no output on two short batches, and why."""


def check_neighbour(architecture: Architecture, noted: Noted, seed: int) -> None:
    """One field changed: one fingerprint means one function, and two fingerprints mean two."""
    neighbour = changed(noted, seed)
    if neighbour is None:
        return
    plain, name = neighbour
    other = Architecture.parse(plain)
    if other.fingerprint == architecture.fingerprint:
        assert_same_function(architecture, other)
        return
    models = architecture.build(seed=3), other.build(seed=3)
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in models]
    if shapes[0] == shapes[1] and name.rpartition(".")[-1] not in MAY_HIDE:
        for model in models:
            stir(model, 4)
        trails = [trail(model, 24) for model in models]
        assert difference(*trails, 1e-6) is not None, f"{name} has no effect"


def check_point(number: int, plain: Plain, noted: Noted) -> None:
    """Check all of the above."""
    architecture = Architecture.parse(plain)
    length = LENGTHS[number % 3]
    check_cost(architecture, length)
    with _nothing_uninitialised():
        check_gradients(architecture, length)
    check_spellings(plain, number)
    check_neighbour(architecture, noted, number)


def check_points(first: int, wanted: int) -> None:
    """Check so many valid points from a number on; all that fail are named."""
    failures, number = [], first
    while wanted:
        drawn = point(number)
        if drawn is not None:
            wanted -= 1
            try:
                check_point(number, *drawn)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(f"point {number}: {place.name}: {place.line}: {error}")
        number += 1
    assert not failures, "\n".join(failures)
