"""Every point of the wide space: what is computed of it equals what is built, to the last unit.

The default run takes 60 points, the slow one 5,000: drawn by number, so that a failure names one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counter import count_on_meta
from exact import (
    LENGTHS,
    PER_SHARD,
    SHARDS,
    SHORT,
    assert_same_function,
    check_cost,
    check_gradients,
    check_points,
    check_spellings,
)
from routers import router_of
from wide_space import (
    point,
    wide,
)

from moenas.errors import SpaceError
from moenas.grammar.component import Component, Part, fields
from moenas.grammar.nodes import Choice, Fixed, Listing, Range, Record, Tree
from moenas.model import FFN, Mixer, Router, Selection
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.testing.parts import random_architecture


class Convolved(torch.nn.Module):
    """A product that stands in no list of the oracle."""

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map (B, S) to (B, 1, S - 2)."""
        return F.conv1d(tokens.to(dtype).unsqueeze(1), torch.ones(1, 1, 3, device="meta").to(dtype))


def test_the_oracle_counts_nothing_in_silence() -> None:
    with pytest.raises(AssertionError, match=r"operators in no list .*: convolution"):
        count_on_meta(Convolved(), 1, 8)


# --- points of the wide space ----------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_sixty_points_are_exact(part: int) -> None:
    check_points(1000 * part, 15)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_five_thousand_points_are_exact(shard: int) -> None:
    check_points(10_000 * (shard + 1), PER_SHARD)


def test_no_two_functions_share_a_fingerprint() -> None:
    """Of the canonical plain data, which a fingerprint stands for."""
    by_fingerprint: dict[str, str] = {}
    for number in range(2200):
        drawn = point(number)
        if drawn is not None:
            architecture = Architecture.parse(drawn[0])
            text = json.dumps(architecture.canonical().plain(), sort_keys=True)
            assert by_fingerprint.setdefault(architecture.fingerprint, text) == text, number
    assert len(by_fingerprint) > 900


# --- each kind and each word alone -----------------------------------------------------------------


KINDS = [kind for family in (Mixer, FFN) for kind in family.kinds.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_kind_alone_is_exact(kind: type[Part], seed: int) -> None:
    """With random values of all fields, not only values of the wide space."""
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


@pytest.mark.parametrize("selection", list(Selection.kinds))
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
    assert not router_of(selection=selection, top_k=1, allow_acausal=True).normalizes
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
        {"mixer": ATTENTION | {"rope": {"partial_rotary_factor": 0.25, "theta": 50.0}}},
        {"mixer": ATTENTION | {"rope": {"partial_rotary_factor": 0.25}}},
    ),
    "one pair of a latent key": (
        {"mixer": LATENT | {"rope_dim": 2, "rope": {"theta": 50.0}}},
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
