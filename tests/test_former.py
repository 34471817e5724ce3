"""Files that were written against former names of modules."""

from __future__ import annotations

import importlib

import pytest

import moenas
import moenas.evaluate.subject
import moenas.report.figures
from moenas.former import PRESENT, RENAMED
from moenas.space.objective import Objective, load_objective, meaning

BODY = '''
direction = "minimize"
unit = "count"
needs = "cost"


def measure(subject):
    """Count."""
    return Measurement(float(subject.cost.params))
'''


@pytest.mark.parametrize(("former", "present"), PRESENT.items())
def test_a_former_name_gives_the_present_module(former: str, present: str) -> None:
    name = next(n for n in vars(importlib.import_module(present)) if not n.startswith("_"))
    with pytest.warns(DeprecationWarning, match=f"from {present} import {name}"):
        module = getattr(importlib.import_module(former), name)
    assert module is getattr(importlib.import_module(present), name)


@pytest.mark.parametrize(("former", "present"), RENAMED.items())
def test_a_class_is_found_by_its_former_name(former: str, present: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"import {present}"):
        cls = getattr(importlib.import_module("moenas.parts"), former)
    assert cls is getattr(importlib.import_module("moenas.model"), present)


@pytest.mark.parametrize(("former", "present"), [("Picked", "SelectedSlots"), ("Lent", "SharedKV")])
def test_a_stored_component_imports_a_class_by_its_former_name(former: str, present: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"import {present}"):
        cls = getattr(importlib.import_module("moenas.model"), former)
    assert cls is getattr(importlib.import_module("moenas.model"), present)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        importlib.import_module("moenas.model").Nothing  # noqa: B018


def test_a_name_that_never_was_is_not_there() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("moenas.nothing")
    with pytest.raises(AttributeError):
        importlib.import_module("moenas.parts").Nothing  # noqa: B018


def test_an_objective_of_before_loads_and_keeps_its_digest() -> None:
    former = '"""Parameters."""\nfrom moenas.objective import Measurement\n' + BODY
    present = '"""Parameters."""\nfrom moenas.space.objective import Measurement\n' + BODY
    with pytest.warns(DeprecationWarning, match=r"moenas\.objective is a former name"):
        objective = load_objective("mine", former)
    assert isinstance(objective, Objective)
    assert meaning(former) == meaning(present)
    assert moenas.Measurement is importlib.import_module("moenas.space.objective").Measurement
