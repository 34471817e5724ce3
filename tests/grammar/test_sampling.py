"""Counting, listing holes and drawing: against brute force over every point."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Cart, every_point

from moenas.errors import SpaceError
from moenas.grammar import sampling
from moenas.grammar import tree as grammar
from moenas.grammar.counting import count
from moenas.grammar.enumeration import enumerate_points
from moenas.grammar.nodes import Tree
from moenas.grammar.option_check import check_options
from moenas.resources import Node, parse_yaml
from moenas.space.space import Space


def read(text: str) -> Tree:
    return grammar.read(Cart, parse_yaml(text, "f"))


ints = st.integers(1, 6) | st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(
    lambda options: {"choice": options}
)
ranges = st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)).map(
    lambda t: {"int": [t[0], t[0] + t[1] * t[2]], "step": t[2]}
)
discs = st.fixed_dictionaries(
    {"kind": st.just("disc")},
    optional={
        "radius": st.just({"int": [4, 12], "step": 4}),
        "colour": st.just({"choice": ["red", "blue"]}),
    },
)
spoked = st.fixed_dictionaries(
    {"kind": st.just("spoked")},
    optional={"spokes": ints | ranges, "tension": st.just({"choice": [None, 1.5]})},
)
wheel: st.SearchStrategy[Any] = st.recursive(
    discs | spoked,
    lambda inner: st.lists(inner, min_size=1, max_size=2).map(lambda options: {"choice": options}),
    max_leaves=3,
)
group = st.fixed_dictionaries(
    {"wheel": wheel},
    optional={
        "repeat": st.integers(1, 2) | st.sampled_from([{"int": [1, 2]}, {"choice": [1, 2]}]),
        "vary": st.booleans(),
    },
)
axle = group | st.lists(group, min_size=1, max_size=2).map(lambda options: {"choice": options})
carts = st.fixed_dictionaries(
    {"axles": st.lists(axle, min_size=1, max_size=2)}, optional={"width": ints | ranges}
)


@settings(max_examples=150, deadline=None)
@given(carts)
def test_count_and_draws_agree_with_brute_force(plain: dict[str, Any]) -> None:
    tree = grammar.read(Cart, Node.wrap(plain))
    total = count(tree)
    if total > 3000:
        return
    points = [json.dumps(p, sort_keys=True) for p in every_point(tree)]
    assert len(points) == total
    drawn = sampling.draw(tree, sampling.RandomSuggest(0))
    assert json.dumps(drawn, sort_keys=True) in points
    names = [hole.name for hole in sampling.holes(tree)]
    assert len(names) == len(set(names))


@settings(max_examples=50, deadline=None)
@given(carts, st.integers(0, 10**6))
def test_a_drawn_point_is_a_space_of_size_one_that_draws_itself(
    plain: dict[str, Any], seed: int
) -> None:
    tree = grammar.read(Cart, Node.wrap(plain))
    point = sampling.draw(tree, sampling.RandomSuggest(seed))
    again = grammar.read(Cart, Node.wrap(point))
    assert count(again) == 1
    assert sampling.draw(again, sampling.RandomSuggest(seed + 1)) == point


@settings(max_examples=100, deadline=None)
@given(carts)
def test_enumerated_points_are_those_of_brute_force(plain: dict[str, Any]) -> None:
    tree = grammar.read(Cart, Node.wrap(plain))
    if count(tree) > 1000:
        return
    enumerated = list(enumerate_points(tree))
    points = [sampling.draw(tree, optuna.trial.FixedTrial(params)) for params in enumerated]
    assert points == list(every_point(tree))
    assert len({repr(sorted(params.items())) for params in enumerated}) == count(tree)


def test_enumerated_names_are_those_that_a_draw_asks_for() -> None:
    tree = read(
        "axles: [{repeat: {int: [1, 2]}, vary: true, wheel: {choice: [{kind: disc, radius:"
        " {int: [4, 64], log: true}}, {kind: spoked, tension: {float: [0, 1], step: 0.25}}]}}]"
    )
    space = {repr(sorted(params.items())) for params in enumerate_points(tree)}
    assert len(space) == count(tree) == 21 + 21**2
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(30):
        trial = study.ask()
        sampling.draw(tree, trial)
        assert repr(sorted(trial.params.items())) in space


def test_enumeration_is_lazy_limited_and_refuses_continuous_ranges_at_once() -> None:
    disc = "axles: [{repeat: 60, vary: true, wheel: {kind: disc, radius: {int: [4, 64]}}}]"
    first = list(enumerate_points(read(disc), 3))
    assert [params["axles.0.59.wheel.radius"] for params in first] == [4, 8, 12]
    assert list(enumerate_points(read("axles: [{wheel: {kind: disc}}]"))) == [{}]
    with pytest.raises(SpaceError, match="f:1:9: slack: a continuous range"):
        enumerate_points(read("{slack: {float: [0, 1]}, axles: [{wheel: {kind: disc}}]}"))


def test_a_logarithmic_range_of_multiples_is_drawn_as_a_number_of_them() -> None:
    tree = read("axles: [{wheel: {kind: disc, radius: {int: [4, 64], log: true}}}]")
    check_options(tree)
    assert count(tree) == 16
    [hole] = sampling.holes(tree)
    assert hole.name == "axles.0.wheel.radius/4"
    drawn = [
        sampling.draw(tree, sampling.RandomSuggest(seed))["axles"][0]["wheel"]["radius"]
        for seed in range(400)
    ]
    assert set(drawn) == set(range(4, 65, 4))
    assert sum(radius <= 16 for radius in drawn) > 180  # half of the range by its logarithm
    assert grammar.unparse(tree)["axles"][0]["wheel"]["radius"] == {"int": [4, 64], "log": True}


def test_ten_to_the_thirty_points_are_counted_at_once() -> None:
    tree = read("axles: [{repeat: 30, vary: true, wheel: {kind: spoked, spokes: {int: [2, 11]}}}]")
    assert count(tree) == 10**30


def test_a_continuous_range_counts_as_one() -> None:
    tree = read(
        "{slack: {float: [0.1, 0.9]}, width: {int: [1, 4]}, axles: [{wheel: {kind: disc}}]}"
    )
    assert count(tree) == 4


def test_an_optuna_trial_draws_and_replays_the_same_point() -> None:
    tree = read(
        "{width: {int: [1, 64], log: true}, slack: {float: [0, 1], step: 0.25},"
        " axles: [{repeat: {int: [1, 3]}, vary: true, wheel: {choice: [{kind: disc, radius:"
        " {choice: [4, 8]}}, {kind: spoked, tension: {choice: [null, 0.5]}}]}}]}"
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(20):
        trial = study.ask()
        point = sampling.draw(tree, trial)
        again = sampling.draw(tree, optuna.trial.FixedTrial(trial.params))
        assert again == point
        grammar.parse(Cart, point)


def test_counts_stay_exact_where_floats_would_not() -> None:
    tree = read("{width: {int: [3, 999999999999999], step: 3}, axles: [{wheel: {kind: disc}}]}")
    assert count(tree) == 333333333333333


def test_a_layer_that_reads_an_earlier_one_may_stand_in_a_list() -> None:
    """Items are looked at by themselves; what must hold between them is asked of each draw."""
    text = """
architecture:
  vocab_size: 256
  d_model: 16
  blocks:
    - mixer: {kind: attention, head_dim: 8, rope: {theta: {choice: [100.0, 1000.0]}}}
    - mixer: {kind: attention, head_dim: 8, rope: {theta: 100.0}, kv_source: {choice: [null, 1]}}
objectives: [active_params]
"""
    space = Space.parse(text, "space.yaml")
    valid = 0
    for seed in range(40):
        plain = space.draw(sampling.RandomSuggest(seed))
        first, second = (block["mixer"] for block in plain["blocks"])
        alike = second["kv_source"] is None or first["rope"]["theta"] == 100.0
        if alike:
            valid += 1
            space.architecture(plain)
        else:
            with pytest.raises(SpaceError, match=r"their rope\.theta differ"):
                space.architecture(plain)
    assert 20 < valid < 40
