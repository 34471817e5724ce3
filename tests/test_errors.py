"""Errors of input: their fields, their text and their JSON."""

from __future__ import annotations

import pickle

import pytest

from moenas.errors import DataError, MoenasError, SourceLocation, SpaceError
from moenas.resources import parse_yaml


@pytest.mark.parametrize(
    ("location", "path", "text"),
    [
        (SourceLocation("a.yaml", 3, 9), "train.batch", "a.yaml:3:9: train.batch: 0 is below 1"),
        (SourceLocation("a.yaml"), None, "a.yaml: 0 is below 1"),
        (SourceLocation(""), "train.batch", "train.batch: 0 is below 1"),
        (None, None, "0 is below 1"),
    ],
)
def test_the_text_is_made_of_the_fields(
    location: SourceLocation | None, path: str | None, text: str
) -> None:
    error = SpaceError("0 is below 1", location=location, path=path)
    assert str(error) == text
    again = pickle.loads(pickle.dumps(error))  # as Ray sends it
    assert str(again) == text
    assert again.plain() == error.plain()


def test_the_fields_are_those_of_the_file() -> None:
    with pytest.raises(SpaceError) as raised:
        parse_yaml("a: 1\nb: &x 2\n", "a.yaml")
    plain = raised.value.plain()
    assert (plain["file"], plain["line"], plain["column"]) == ("a.yaml", 2, 4)
    assert plain["message"].startswith("anchors")


def test_an_error_without_a_place_has_no_fields_of_one() -> None:
    assert MoenasError("x").plain() == {"error": "MoenasError", "message": "x"}
    assert DataError("x", path="data").plain() == {
        "error": "DataError", "message": "x", "path": "data",
        "file": None, "line": None, "column": None,
    }  # fmt: skip
