"""The reference of the space file says all that the code accepts, and the stored copy is fresh."""

from __future__ import annotations

from pathlib import Path

import pytest

from moenas.data import section
from moenas.grammar.hole_reading import HOLES
from moenas.model import Router
from moenas.space import reference, space
from moenas.space.section_reading import known_names

STORED = Path(__file__).parents[2] / "docs" / "space_file.md"


@pytest.fixture(scope="module")
def text() -> str:
    return reference.reference()


def test_the_stored_copy_is_fresh(text: str) -> None:
    assert STORED.read_text(encoding="utf-8") == text, "run `make docs`"


def test_every_section_is_described() -> None:
    assert set(reference.SECTIONS) == set(space.KEYS)


def test_every_hole_and_its_keys_are_described() -> None:
    for hole, keys in HOLES.items():
        forms = [form for form in reference.HOLE_FORMS if f"{{{hole}: " in form]
        described = " ".join(form + reference.HOLE_FORMS[form] for form in forms)
        assert forms
        assert all(key in described or key in reference.HOLES for key in keys)


def test_every_corpus_is_described() -> None:
    forms = [*reference.DATA_FORMS.items(), *reference.DATA_KEYS.items()]
    described = " ".join(form + text for form, text in forms)
    keys = {key for keys in section.KEYS.values() for key in keys} - {"kind"}
    assert all(word in described for word in keys | set(section.KEYS))


def test_every_name_of_a_requirement_is_listed(text: str) -> None:
    section = text.partition("\n## `require`")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in section for name in known_names() if "." not in name)


def test_every_preset_is_spelled_out(text: str) -> None:
    for name, values in Router.presets.items():
        table = text.partition("| preset | fields |")[2].partition("\n\n")[0]
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(f"`{key}: " in row for key in values)


def test_a_table_has_as_many_cells_in_each_row(text: str) -> None:
    for block in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, rows[:1]
