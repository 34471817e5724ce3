"""The contract check of objective files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moenas.errors import CandidateError, InputError, NotFoundError
from moenas.records import Evaluation
from moenas.space.objective import (
    Measurement,
    apply_reference_times,
    load_objective,
    meaning,
    shipped_objective,
)

GOOD = '''"""Layers of the model.

More words.
"""

from moenas.space.objective import Measurement

direction = "minimize"
unit = "layers"
needs = "cost"


def measure(subject):
    return Measurement(len(subject), {"n": 1})
'''


def write(folder: Path, text: str, name: str = "depth") -> str:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_complete_file_becomes_an_objective(tmp_path: Path) -> None:
    objective = load_objective(write(tmp_path, GOOD))
    assert (objective.name, objective.direction, objective.unit) == ("depth", "minimize", "layers")
    assert (objective.needs, objective.doc, objective.from_user) == (
        "cost",
        "Layers of the model.",
        True,
    )
    assert objective.measure([1, 2]) == Measurement(2.0, {"n": 1})
    info = objective.info()
    assert info.sha256 == meaning(GOOD) == meaning("# A comment.\n" + GOOD)
    assert info.sha256 != meaning(GOOD.replace("minimize", "maximize"))
    assert (info.name, info.direction, info.unit) == ("depth", "minimize", "layers")


def test_a_source_text_needs_no_file() -> None:
    objective = load_objective("depth", source=GOOD)
    assert objective.name == "depth"
    assert objective.from_user
    assert objective.measure("abc").value == 3.0


def test_the_folder_here_shadows_a_shipped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objectives").mkdir()
    write(tmp_path / "objectives", GOOD, "val_loss")
    monkeypatch.chdir(tmp_path)
    assert load_objective("val_loss").from_user
    assert load_objective("val_loss").unit == "layers"
    assert shipped_objective("val_loss").unit == "nats/token"
    assert not shipped_objective("val_loss").from_user


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('direction = "minimize"\n', "", 1, "direction is missing"),
        ('"minimize"', '"minimise"', 8, "Did you mean 'minimize'?"),
        ('"minimize"', "-1", 8, 'write direction = "minimize" or "maximize"'),
        ('unit = "layers"\n', "", 1, "unit is missing"),
        ('"layers"', "3", 9, "unit is 3"),
        ('"cost"', '"costs"', 10, "Did you mean 'cost'?"),
        ('needs = "cost"\n', "", 1, "needs is missing"),
        ("def measure(subject)", "def gauge(subject)", 1, "measure is missing"),
        ("def measure(subject)", "def measure()", 13, "write def measure(subject) -> float"),
        ("def measure(subject)", "measure = 5\ndef gauge(subject)", 13, "measure is 5"),
        ("unit =", "unit =\nx =", 9, "invalid syntax"),
        ("unit =", "unit = 1 / 0 #", 9, "ZeroDivisionError"),
        ("from moenas.space.objective", "from no_such_module", 6, "no_such_module"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, words: str
) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_objective(path)
    assert words in str(error.value)
    place = str(error.value).removeprefix(path).removeprefix(":").strip()
    assert place.startswith((f"{line}:", f"line {line}:"))


def test_a_missing_docstring_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.split('"""\n', 1)[1])
    with pytest.raises(InputError, match=r":1: the docstring is missing"):
        load_objective(path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'val_loss'"):
        load_objective("val_los")
    with pytest.raises(NotFoundError, match="Did you mean 'val_loss'"):
        shipped_objective("val_los")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ('float("nan")', "gave nan; give back a finite number"),
        ('float("inf")', "gave inf"),
        ('"fast"', "gave 'fast'; give back a number"),
        ("None", "gave None"),
        ("Measurement(1.0, {'a': object()})", "not JSON"),
        ("Measurement(1.0, {'a': float('nan')})", "not JSON"),
    ],
)
def test_what_is_no_finite_number_is_refused(tmp_path: Path, result: str, words: str) -> None:
    path = write(tmp_path, GOOD.replace('Measurement(len(subject), {"n": 1})', result))
    with pytest.raises(CandidateError) as error:
        load_objective(path).measure([])
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}:13: measure ")


def test_an_error_of_a_guest_goes_through(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("len(subject)", "subject.depth"))
    with pytest.raises(AttributeError, match="depth"):
        load_objective(path).measure([])


def test_latencies_are_expressed_by_the_reference_that_the_study_fixed() -> None:
    details = {"ratio": 1.5, "reference_ms": 2.0, "reference_key": "a", "n": 10}
    evaluation = Evaluation(
        study="s",
        trial=0,
        attempt=1,
        status="complete",
        fingerprint="f",
        values={"decode_ms": 3.0, "val_loss": 2.0},
        measurements={"decode_ms": details, "val_loss": {"unit": "nats/token"}},
    )
    moved = apply_reference_times(evaluation, {"a": 4.0, "b": 9.0})
    assert moved.values == {"decode_ms": 6.0, "val_loss": 2.0}
    assert moved.measurements["decode_ms"] == details | {"reference_ms": 4.0}
    assert apply_reference_times(evaluation, {"b": 9.0}) == evaluation
    assert (
        dataclasses.replace(moved, values=evaluation.values, measurements=evaluation.measurements)
        == evaluation
    )
