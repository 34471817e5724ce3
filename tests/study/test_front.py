"""The front of a study, as Python gives it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from moenas.errors import InputError
from moenas.model.architecture import Architecture
from moenas.study.front import Front, Member


def front(*values: tuple[float, float]) -> Front:
    names = ("val_loss", "tokens_per_second")
    members = (
        Member(i, dict(zip(names, each, strict=True)), {}) for i, each in enumerate(values, 10)
    )
    return Front(tuple(members), {names[0]: "minimize", names[1]: "maximize"}, None, {})


PLAIN = Architecture.parse(
    {
        "vocab_size": 256,
        "d_model": 64,
        "blocks": [{"repeat": 9, "mixer": {"kind": "attention", "head_dim": 16}}],
    }
).plain()


def test_the_text_of_a_member_fits_a_line_or_two() -> None:
    member = Member(12, {"val_loss": 2.13812345678, "flops": 665000.0}, PLAIN, seeds=3)
    assert len(repr(PLAIN)) > 1000
    assert len(repr(member)) < 160
    assert repr(member) == (
        "Member(trial=12, val_loss=2.13812, flops=665000,"
        " architecture=<64d rmsnorm, 9x attention>, seeds=3)"
    )
    assert repr(Member(1, {}, {})) == "Member(trial=1, architecture=<no architecture>)"


def test_a_notebook_shows_a_figure_and_a_table() -> None:
    shown = Front(
        tuple(
            Member(i, {"val_loss": 2.0 + i, "cost": 9.0 - i}, PLAIN, probability=0.5)
            for i in range(3)
        ),
        {"val_loss": "minimize", "cost": "minimize"},
        1.0,
        {},
    )._repr_html_()
    drawing = ElementTree.fromstring(shown[: shown.index("</svg>") + 6])
    circles = [e for e in drawing.iter() if e.tag.endswith("circle")]
    assert [float(c.attrib["cy"]) for c in circles] == sorted(
        float(c.attrib["cy"]) for c in circles
    )
    titles = [e.text for e in drawing.iter() if e.tag.endswith("title")]
    assert titles[-1] == "trial 0, val_loss 2, cost 9"
    assert "<table" in shown
    assert "<script" not in shown


def test_a_line_joins_the_members_of_two_objectives_alone() -> None:
    values = {"val_loss": 2.0, "cost": 9.0, "ms": 1.0}
    for names in (["val_loss", "cost"], ["val_loss", "cost", "ms"]):
        member = Member(0, {name: values[name] for name in names}, PLAIN)
        shown = Front((member,), dict.fromkeys(names, "minimize"), 1.0, {})._repr_html_()
        assert ("<polyline" in shown) == (len(names) == 2)


def test_one_objective_or_no_member_has_no_figure() -> None:
    one = Front((Member(1, {"val_loss": 2.0}, PLAIN),), {"val_loss": "minimize"}, None, {})
    assert "<svg" not in one._repr_html_()
    assert "<svg" not in front()._repr_html_()


def test_the_knee_is_the_member_with_the_best_compromise() -> None:
    assert front((2.0, 100.0), (2.1, 900.0), (3.0, 1000.0)).knee.trial == 11
    assert front((2.0, 100.0)).knee.trial == 10


def test_an_empty_front_has_no_knee() -> None:
    with pytest.raises(InputError, match="a knee needs at least one"):
        _ = front().knee
