"""An architecture as a person writes it: the same architecture, without its defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moenas.grammar.brief import DEFAULTS, brief
from moenas.model.architecture import Architecture
from moenas.space import reference
from moenas.space.space import Space

ZOO = sorted((Path(__file__).parents[2] / "spaces" / "zoo").glob("*.yaml"))


def test_the_defaults_on_file_are_those_of_the_components() -> None:
    assert DEFAULTS.read_text() == reference.defaults(), "write them anew: make docs"


@pytest.mark.parametrize("path", ZOO[::6], ids=lambda path: path.stem)
def test_it_is_the_same_architecture(path: Path) -> None:
    (architecture,) = Space.load(str(path)).feasible(1)
    assert isinstance(architecture, Architecture)
    whole = architecture.canonical().plain()
    short = brief(whole)
    assert Architecture.parse(short).fingerprint == architecture.fingerprint
    assert short == architecture.canonical().brief()
    assert len(json.dumps(short)) < len(json.dumps(whole))


def test_a_part_of_the_users_is_written_in_full() -> None:
    part = {"kind": "nobody_knows", "n_heads": 4, "bias": False}
    plain = {"d_model": 64, "norm": "rmsnorm", "blocks": [{"repeat": 1, "mixer": part}]}
    assert brief(plain) == {"d_model": 64, "blocks": [{"mixer": part}]}
