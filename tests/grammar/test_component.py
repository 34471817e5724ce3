"""The records that parts are: kinds, fields and their words for errors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from toys import Axle, Cart, Disc, Wheel

from moenas.errors import SpaceError
from moenas.grammar.component import Component, fields


def test_fields_know_their_types_bounds_and_defaults() -> None:
    disc = fields(Disc)
    assert list(disc) == ["radius", "colour"]
    assert (disc["radius"].low, disc["radius"].high, disc["radius"].multiple) == (1, 64, 4)
    assert disc["colour"].choices == ("red", "blue")
    assert fields(Axle)["wheel"].component is Wheel
    assert fields(Axle)["wheel"].required
    assert fields(Cart)["axles"].is_list


def test_a_kind_cannot_be_defined_twice() -> None:
    with pytest.raises(SpaceError, match="'disc' already exists"):

        @dataclass(frozen=True, kw_only=True)
        class Other(Wheel, kind="disc"):
            """Clashes with the toy disc."""

    assert Wheel.kinds["disc"] is Disc


def test_families_do_not_share_their_kinds() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Family(Component):
        """Another toy family."""

    assert Family.kinds == {}
    assert set(Wheel.kinds) == {"disc", "spoked"}
