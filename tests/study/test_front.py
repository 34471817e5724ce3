"""The front of a study, as Python gives it."""

from __future__ import annotations

import pytest

from moenas.errors import InputError
from moenas.study.front import Front, Member


def front(*values: tuple[float, float]) -> Front:
    names = ("val_loss", "tokens_per_second")
    members = (
        Member(i, dict(zip(names, each, strict=True)), {}) for i, each in enumerate(values, 10)
    )
    return Front(tuple(members), {names[0]: "minimize", names[1]: "maximize"}, None, {})


def test_the_knee_is_the_member_with_the_best_compromise() -> None:
    assert front((2.0, 100.0), (2.1, 900.0), (3.0, 1000.0)).knee.trial == 11
    assert front((2.0, 100.0)).knee.trial == 10


def test_an_empty_front_has_no_knee() -> None:
    with pytest.raises(InputError, match="a knee needs at least one"):
        _ = front().knee
