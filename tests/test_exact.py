"""Every point of the wide space: what is computed of it equals what is built, to the last unit.

The default run takes 60 points, the slow one 5,000: drawn by number, so that a failure names one.
"""

from __future__ import annotations

import json
import random
import traceback
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counter import count_on_meta
from points import (
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
    wide,
)

from moenas.architecture import Architecture, Model
from moenas.component import Component, Part, fields
from moenas.errors import SpaceError
from moenas.flops import count_flops
from moenas.grammar import Choice, Fixed, Listing, Range, Record, Tree
from moenas.parts import FFN, KVCache, Mixer, MoE, MoEFFN, Router, StateCache
from moenas.parts.scores import Relu
from moenas.records import Plain
from moenas.testing import _nothing_uninitialised, random_architecture

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

    Nor is there a sink, which is a key that the cost leaves out.
    """
    if any(getattr(layer.mixer, "sinks", False) for layer in architecture.layers):
        return False
    mixtures = [p for x in architecture.layers for p in x.parts.values() if isinstance(p, MoEFFN)]
    return all(
        part.n_zero_experts == 0
        and part.router.chooses.slots(part.router.top_k, length, part.n_choices)
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
        grown = sum(part.nbytes for c in held for part in (c.keys, c.values) if part is not None)
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
    found = set[str]()
    for i, layer in enumerate(architecture.layers):
        if getattr(layer.mixer, "dt_floor", 0.0):
            found.add(f"blocks.{i}.mixer.dt_bias")
    for name, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        load = module.routing.load
        relu = isinstance(module.router.score, Relu)
        if relu or not load[module.experts.n_experts :].any():
            found |= {f"{name}.zero.mix", f"{name}.zero.vector"}
        if relu or not load[: module.experts.n_experts].any():
            found |= {f"{name}.experts.{n}" for n, _ in module.experts.named_parameters()}
        if len(load) == 1 or not load.any():
            found |= {f"{name}.router.{n}" for n, _ in module.router.named_parameters()}
    return found


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
    """Both start from the same weights, and compute and train alike from any.

    Where two feed-forward layers are written as one or change places, weights are carried over, and
    logits and losses are compared. Two spellings may round differently, and a rounding can carry a
    unit over the kink of a relu or a token to another expert: a difference counts if it shows from
    other weights, too.
    """
    models = [architecture.build(seed=3) for architecture in (one, other)]
    assert models[0].n_writes == models[1].n_writes
    moved = feed_forward(one) != feed_forward(other)
    if not moved:
        first, second = (
            {labels(model)[name]: p for name, p in model.named_parameters()} for model in models
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    found = []
    for seed in (4, 5):
        trails = []
        for architecture in (one, other):
            model, canonical = architecture.build(seed=3), architecture.canonical().build(seed=3)
            stir(canonical, seed)
            carry(architecture, model, canonical)
            trails.append(trail(model, 16))
        if moved:
            trails = [{k: v for k, v in t.items() if k[2:] in ("logits", "loss")} for t in trails]
        found.append(difference(*trails, 2e-3))
        if found[-1] is None:
            return
    raise AssertionError(f"two functions share a fingerprint: they differ in {found}")


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
    "bias_rate": "the bias moves too little to change a choice",
    "aux_coef": "the load is even in these batches",
    "aux_scope": "the load is even in these batches",
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
        found = point(number)
        if found is not None:
            wanted -= 1
            try:
                check_point(number, *found)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(f"point {number}: {place.name}: {place.line}: {error}")
        number += 1
    assert not failures, "\n".join(failures)


class Convolved(torch.nn.Module):
    """A product that stands in no list of the oracle."""

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map (B, S) to (B, 1, S - 2)."""
        return F.conv1d(tokens.to(dtype).unsqueeze(1), torch.ones(1, 1, 3, device="meta").to(dtype))


def test_the_oracle_counts_nothing_in_silence() -> None:
    with pytest.raises(AssertionError, match=r"operators in no list .*: convolution"):
        count_on_meta(Convolved(), 1, 8)


# --- points of the wide space ----------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_sixty_points_are_exact(part: int) -> None:
    check_points(1000 * part, 15)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_five_thousand_points_are_exact(shard: int) -> None:
    check_points(10_000 * (shard + 1), PER_SHARD)


def test_no_two_functions_share_a_fingerprint() -> None:
    """Of the canonical plain data, which a fingerprint stands for."""
    found: dict[str, str] = {}
    for number in range(2000):
        drawn = point(number)
        if drawn is not None:
            architecture = Architecture.parse(drawn[0])
            text = json.dumps(architecture.canonical().plain(), sort_keys=True)
            assert found.setdefault(architecture.fingerprint, text) == text, number
    assert len(found) > 900


# --- each kind and each word alone -----------------------------------------------------------------


KINDS = [kind for family in (Mixer, FFN) for kind in family.kinds.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("seed", range(2))
def test_every_kind_alone_is_exact(kind: type[Part], seed: int) -> None:
    """With random values of all fields, not only those of the wide space."""
    architecture = random_architecture(seed, kind)
    check_cost(architecture, LENGTHS[seed])
    check_spellings(architecture.plain(), seed)


def one_layer(ffn: Plain, **fields: Any) -> Architecture:
    mixer = {"kind": "short_conv"}
    plain = {"vocab_size": 40, "d_model": 16, "blocks": [{"mixer": mixer, "ffn": ffn}]}
    return Architecture.parse(plain | fields)


def mixture(router: Plain, **fields: Any) -> Architecture:
    ffn = {"kind": "moe", "n_experts": 6, "d_expert": 8, "router": router}
    return one_layer(ffn | fields)


@pytest.mark.parametrize("selection", fields(Router)["selection"].choices)
@pytest.mark.parametrize("n_zero_experts", [0, 3])
@pytest.mark.parametrize("top_k", [1, 4])
def test_every_selection_alone_is_exact(selection: str, n_zero_experts: int, top_k: int) -> None:
    """Rows that carry nothing, or are more than top_k a token, are foreseen to the last one."""
    if selection == "base" and top_k > 1:
        pytest.skip("it assigns one expert")
    router = {"selection": selection, "top_k": top_k, "allow_acausal": True}
    architecture = mixture(router, n_zero_experts=n_zero_experts)
    for length in (7, 12):
        check_cost(architecture, length)
    check_gradients(architecture, SHORT)


@pytest.mark.parametrize("name", sorted(Router.presets))
def test_a_preset_is_a_spelling_of_its_fields(name: str) -> None:
    spelled = mixture({"preset": name, "top_k": 2}, n_experts=12)
    written = mixture({**Router.presets[name], "top_k": 2}, n_experts=12)
    assert spelled == written
    assert spelled.fingerprint == written.fingerprint


def test_noise_has_a_gradient_in_training_only() -> None:
    model = mixture({"selection": "noisy_top_k", "balance": "none"}).build()
    tokens = torch.arange(24).view(2, 12)
    for training in (True, False):
        model.zero_grad(set_to_none=True)
        model.train(training).loss(tokens, tokens.roll(-1, 1)).backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert without == (set() if training else {"blocks.0.ffn.router.noise.weight"})


@pytest.mark.parametrize("selection", ["threshold", "expert_choice"])
def test_a_mean_of_one_expert_may_be_normalized(selection: str) -> None:
    """A token may have several experts then, so the router learns; of one expert it would not."""
    router = {"selection": selection, "top_k": 1, "normalize": True, "allow_acausal": True}
    model = mixture(router | {"balance": "none", "score": "sigmoid"}).build()
    tokens = torch.arange(40).view(2, 20)
    for _ in range(2):  # cut-offs exist from the second step on
        model.zero_grad()
        model.loss(tokens, tokens.roll(-1, 1)).backward()
        model.after_step()
    assert model.blocks[0].ffn.router.logits.weight.grad.any()
    assert not Router(selection=selection, top_k=1, allow_acausal=True).normalizes
    with pytest.raises(SpaceError, match="with one expert and normalize: true"):
        mixture(router, n_experts=1)


def test_a_memory_that_reads_one_vector_is_refused() -> None:
    """The softmax over one is 1, whatever the keys are."""
    with pytest.raises(SpaceError, match="top_k: 1 the keys learn nothing"):
        one_layer({"kind": "product_key", "n_keys": 4, "top_k": 1})


# --- fields without effect -------------------------------------------------------------------------

ATTENTION: Plain = {"kind": "attention", "head_dim": 8}
LATENT: Plain = {"kind": "latent_attention", "n_heads": 2, "kv_rank": 4, "nope_dim": 8, "v_dim": 8}
MOE: Plain = {"kind": "moe", "n_experts": 4, "d_expert": 8}
DENSE: Plain = {"kind": "dense", "d_ff": 8}

ALIKE: dict[str, tuple[Plain, Plain]] = {
    "one pair of elements turns by the position, whatever the base": (
        {"mixer": ATTENTION | {"rope_fraction": 0.25, "rope_theta": 50.0}},
        {"mixer": ATTENTION | {"rope_fraction": 0.25}},
    ),
    "one pair of a latent key": (
        {"mixer": LATENT | {"rope_dim": 2, "rope_theta": 50.0}},
        {"mixer": LATENT | {"rope_dim": 2}},
    ),
    "relu before or after a weight, beside constant experts": (
        {"ffn": MOE | {"activation": "relu", "n_zero_experts": 2, "zero_kind": "constant"}
         | {"router": {"weight_on": "input"}}},
        {"ffn": MOE | {"activation": "relu", "n_zero_experts": 2, "zero_kind": "constant"}},
    ),
    "all experts by hash": (
        {"ffn": MOE | {"router": {"selection": "hash", "top_k": 4}}},
        {"ffn": MOE | {"router": {"top_k": 4}}},
    ),
    "the load of one expert is even": (
        {"ffn": MOE | {"n_experts": 1, "router": {"selection": "threshold", "top_k": 1}}},
        {"ffn": MOE | {"n_experts": 1, "router": {"selection": "threshold", "top_k": 1, "balance": "none"}}},
    ),
    "a shortcut without a mixer before its block's ffn": (
        {"ffn": DENSE, "shortcut": MOE, "shortcut_input": "block"},
        {"ffn": DENSE, "shortcut": MOE},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_a_field_without_effect_is_reset(name: str) -> None:
    position = "post" if "shortcut" in name else "pre"
    one, other = (
        Architecture.parse(
            {"vocab_size": 40, "d_model": 16, "norm_position": position, "blocks": [block]}
        )
        for block in ALIKE[name]
    )
    assert one != other
    assert one.fingerprint == other.fingerprint
    assert_same_function(one, other)


# --- the file --------------------------------------------------------------------------------------


def test_the_wide_space_opens_every_field() -> None:
    """Every kind and word is offered, and every other field takes at least two values."""
    offered: dict[tuple[type[Component], str], set[Any]] = defaultdict(set)
    collect(wide().tree, offered)
    closed, todo, seen = [], [Architecture], set[type[Component]]()
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        todo += cls.kinds.values() if cls.kind is None else []
        for name, field in fields(cls).items():
            todo += [field.component] if field.component else []
            family = field.component is not None and cls.kind is None and bool(cls.kinds)
            wanted = set(field.choices)
            if field.component is not None and field.component.kinds and name != "shortcut":
                wanted = set(field.component.kinds)
            values = offered[cls, name]
            few = field.component is None and len(values) < 2
            if name != "vary" and not family and (wanted - values or few) and not cls.kinds:
                closed.append(f"{cls.__name__}.{name}: {wanted - values or values}")
    assert not closed, f"open these in spaces/wide.yaml: {closed}"


def collect(tree: Tree, offered: dict[tuple[type[Component], str], set[Any]]) -> None:
    """Note every value that a field of a class can take."""
    if isinstance(tree, Choice | Listing):
        for option in tree.options if isinstance(tree, Choice) else tree.items:
            collect(option, offered)
    elif isinstance(tree, Record):
        for name, value in tree.fields.items():
            offered[tree.cls, name] |= set(values_of(value))
            collect(value, offered)


def values_of(tree: Tree) -> Iterator[Any]:
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from values_of(option)
    elif isinstance(tree, Range):
        yield from (tree.low, tree.high)
    elif isinstance(tree, Fixed):
        yield tree.value
    elif isinstance(tree, Record):
        yield tree.cls.kind
