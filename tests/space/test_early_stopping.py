"""The section of early stopping: its kinds, the rungs that it needs, and its errors."""

from __future__ import annotations

import jsonschema
import pytest
import yaml
from studies import ARCHITECTURE

from moenas.errors import SpaceError
from moenas.space.early_stopping import NoEarlyStopping, Predictive, SuccessiveHalving
from moenas.space.space import Space, file_schema

START = f"name: s\n{ARCHITECTURE}\ntrain: {{tokens: 512, context: 16, batch: 4}}\n"


def text(stopping: str, objectives: str = "[val_loss]") -> str:
    return f"{START}objectives: {objectives}\nsearch: {{early_stopping: {stopping}}}\n"


@pytest.mark.parametrize(
    ("written", "expected", "rungs"),
    [
        ("none", NoEarlyStopping(), 0),
        ("successive_halving", SuccessiveHalving(), 2),
        ("{kind: successive_halving, reduction_factor: 4}", SuccessiveHalving(reduction_factor=4.0), 2),
        ("predictive", Predictive(), 2),
    ],
)  # fmt: skip
def test_a_bare_word_takes_the_defaults_and_gets_rungs(
    written: str, expected: object, rungs: int
) -> None:
    parsed = Space.parse(text(written), "s.yaml")
    assert parsed.search.early_stopping == expected
    assert parsed.train.rungs == rungs
    assert parsed.plain()["train"]["rungs"] == rungs
    again = Space.parse(text(written), "s.yaml", ["train.rungs=5"])
    assert again.train.rungs == 5


def test_without_the_section_nothing_changes() -> None:
    plain = Space.parse(START + "objectives: [val_loss]\n", "s.yaml")
    assert plain.search.early_stopping == NoEarlyStopping()
    assert plain.sha256 == Space.parse(text("none"), "s.yaml").sha256


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("halving", r"s.yaml:20:26: search.early_stopping: no .* of kind 'halving'"),
        ("{kind: predictive, min_chance: 2}", r"20:\d+: .*min_chance: 2 is not .* from 0 to 1"),
        ("{kind: none, rungs: 3}", r"no field of 'none'"),
        (
            "{kind: predictive, min_complete: {choice: [5, 9]}}",
            r"20:\d+: search.early_stopping.min_complete: a hole is not allowed here",
        ),
        ("{choice: [none, predictive]}", r"a hole is not allowed here"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(written: str, said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        Space.parse(text(written), "s.yaml")


def test_it_needs_an_objective_that_trains() -> None:
    with pytest.raises(SpaceError, match=r"s.yaml:20:26: .*no objective trains a candidate"):
        Space.parse(text("predictive", "[total_params]"), "s.yaml")


def test_it_needs_a_step_before_the_last() -> None:
    with pytest.raises(SpaceError, match=r"early_stopping: training has 1 step, and a rung needs"):
        Space.parse(text("predictive").replace("512", "64"), "s.yaml")


@pytest.mark.parametrize(
    ("written", "valid"),
    [("predictive", True), ("{kind: none}", True), ("{choice: [none]}", False), ("halving", False)],
)
def test_the_json_schema_says_the_same(written: str, valid: bool) -> None:
    checker = jsonschema.Draft7Validator(file_schema())
    assert checker.is_valid(yaml.safe_load(text(written))) == valid
