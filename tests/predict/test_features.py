"""Features of architectures, and their columns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moenas.model.architecture import Architecture
from moenas.predict.features import Encoder, features
from moenas.space.space import Space


def described(d_model: int, *ffns: dict[str, object]) -> dict[str, float]:
    mixer = {"kind": "attention", "head_dim": 16}
    blocks = [{"mixer": mixer, "ffn": ffn} for ffn in ffns]
    architecture = Architecture.parse({"vocab_size": 256, "d_model": d_model, "blocks": blocks})
    return features(architecture, architecture.cost(64))


DENSE = {"kind": "dense", "d_ff": 128}
MOE = {"kind": "moe", "n_experts": 8, "d_expert": 64}


def test_a_number_is_the_mean_of_the_layers_that_have_it_and_a_word_their_share() -> None:
    text = described(64, DENSE, MOE, MOE | {"n_experts": 4}, DENSE | {"d_ff": 256})
    assert text["block.ffn.d_ff"] == 192
    assert text["block.ffn.n_experts"] == 6
    assert text["block.ffn=moe"] == text["block.ffn=dense"] == 0.5
    assert text["architecture.n_layers"] == 4
    assert text["architecture.d_model"] == 64


def test_costs_are_logarithms() -> None:
    text = described(64, DENSE)
    mixer = {"kind": "attention", "head_dim": 16}
    blocks = [{"mixer": mixer, "ffn": DENSE}]
    architecture = Architecture.parse({"vocab_size": 256, "d_model": 64, "blocks": blocks})
    assert text["cost.params"] == pytest.approx(math.log2(1 + architecture.cost(64).params))


def test_columns_are_from_0_to_1_and_leave_out_what_says_nothing_new() -> None:
    rows = [described(width, DENSE, MOE) for width in (64, 128, 512)]
    encoder = Encoder(rows)
    columns = encoder.encode(rows)
    assert columns.min() == 0.0
    assert columns.max() == 1.0
    assert "architecture.d_model" in encoder.names
    assert "block.ffn.d_ff" not in encoder.names, "equal in all"
    # A width varies by 8, so its logarithm counts: 128 is a third of the way from 64 to 512.
    width = encoder.names.index("architecture.d_model")
    assert columns[1, width] == pytest.approx(1 / 3)


def test_equal_columns_are_kept_once() -> None:
    rows = [{"a": 1.0, "b": 10.0}, {"a": 2.0, "b": 20.0}, {"a": 3.0, "b": 30.0}]
    assert Encoder(rows).names == ["a"]
    mirrored = [{"x=p": 1.0, "x=q": 0.0}, {"x=p": 0.25, "x=q": 0.75}]
    assert Encoder(mirrored).names == ["x=p"]


def test_an_absent_number_is_the_mean_and_an_absent_word_is_none() -> None:
    rows = [{"n": 1.0, "ffn=moe": 1.0}, {"n": 3.0, "ffn=moe": 1.0}, {}]
    encoder = Encoder(rows)
    columns = dict(zip(encoder.names, encoder.encode(rows).T, strict=True))
    assert columns["n"].tolist() == [0.0, 1.0, 0.5]
    assert columns["ffn=moe"].tolist() == [1.0, 1.0, 0.0]


def test_every_hole_of_a_space_is_seen() -> None:
    """Two architectures of different fingerprints differ in a column."""
    space = Space.load("tiny")
    architectures = {a.fingerprint: a for a in space.feasible(200) if not isinstance(a, str)}
    rows = [features(a, space.cost(a)) for a in architectures.values()]
    columns = np.round(Encoder(rows).encode(rows), 9)
    assert len({row.tobytes() for row in columns}) == len(architectures)


def test_rounding_makes_no_column() -> None:
    """A word of all layers is a share of exactly 1, whatever the depth."""
    rows = [described(64, *[MOE | {"router": {"aux_coef": 0.1}}] * n) for n in range(2, 13)]
    constant = {"block.mixer=attention", "block.ffn=moe", "block.ffn.router.balance.coef"}
    assert not constant & set(Encoder(rows).names)
    assert all(row["block.mixer=attention"] == 1.0 for row in rows)
