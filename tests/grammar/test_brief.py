"""An architecture as a person writes it: the same architecture, without its defaults."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moenas.errors import SpaceError
from moenas.grammar.brief import DEFAULTS, brief
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space import reference
from moenas.space.space import Space

ZOO = sorted((Path(__file__).parents[2] / "spaces" / "zoo").glob("*.yaml"))


def test_the_defaults_on_file_are_those_of_the_components() -> None:
    assert DEFAULTS.read_text() == reference.defaults(), "write them anew: make docs"


def printed(plain: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of each field in an architecture, and in the components inside it."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            if name != "kind":
                yield (*path, name)
            yield from printed(value, (*path, name))
    elif isinstance(plain, list):
        for i, value in enumerate(plain):
            yield from printed(value, (*path, i))


def value_at(plain: Any, path: tuple[str | int, ...]) -> Any:
    """Return what a path leads to."""
    return functools.reduce(lambda inner, step: inner[step], path, plain)


def is_needed(short: Plain, path: tuple[str | int, ...], fingerprint: str) -> bool:
    """Whether the architecture without the field is invalid, or another one."""
    rest = copy.deepcopy(short)
    del value_at(rest, path[:-1])[path[-1]]
    try:
        return Architecture.parse(rest).fingerprint != fingerprint
    except SpaceError:
        return True


def assert_brief(architecture: Architecture, *, minimal: bool) -> None:
    """The brief form is the same architecture; if `minimal`, every field of it is needed.

    `balance: none` may stand beside a router whose balancing would have no effect, because the
    canonical form names the balancing that acts.
    """
    whole = architecture.canonical().plain()
    short = brief(whole)
    fingerprint = Architecture.parse(short).fingerprint
    assert fingerprint == architecture.fingerprint
    assert len(json.dumps(short)) < len(json.dumps(whole))
    distinct = {
        (
            tuple(step for step in path if isinstance(step, str)),
            json.dumps(value_at(short, path[:-1])),
        ): path
        for path in (printed(short) if minimal else ())
    }
    unneeded = [path for path in distinct.values() if not is_needed(short, path, fingerprint)]
    assert [
        path for path in unneeded if (path[-1], value_at(short, path)) != ("balance", "none")
    ] == []


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_a_published_model_is_written_without_what_follows_from_the_rest(path: Path) -> None:
    (architecture,) = Space.load(str(path)).feasible(1)
    assert isinstance(architecture, Architecture)
    assert_brief(architecture, minimal=True)


def test_random_architectures_are_written_without_what_follows_from_the_rest() -> None:
    drawn = (a for a in Space.load("wide").feasible(5000) if isinstance(a, Architecture))
    architectures = list(itertools.islice(drawn, 500))
    assert len(architectures) == 500
    for i, architecture in enumerate(architectures):
        assert_brief(architecture, minimal=i % 5 == 0)


def test_values_that_follow_from_others_are_left_out() -> None:
    mixer = {"kind": "attention", "head_dim": 16, "n_heads": 4, "n_kv_heads": 4, "v_head_dim": 16}
    plain = {"d_model": 64, "blocks": [{"repeat": 2, "mixer": mixer}]}
    short = {"kind": "attention", "head_dim": 16}
    assert brief(plain) == {"d_model": 64, "blocks": [{"repeat": 2, "mixer": short}]}
    # The heads of a wider model are other heads, and without a width nothing follows from it.
    wider = brief({**plain, "d_model": 128})
    assert wider["blocks"][0]["mixer"] == {**short, "n_heads": 4}
    assert brief(mixer, "mixer") == {**short, "n_heads": 4}


def test_a_part_of_the_users_is_written_in_full() -> None:
    part = {"kind": "nobody_knows", "n_heads": 4, "bias": False}
    plain = {"d_model": 64, "norm": "rmsnorm", "blocks": [{"repeat": 1, "mixer": part}]}
    assert brief(plain) == {"d_model": 64, "blocks": [{"mixer": part}]}
