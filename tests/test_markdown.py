"""Markdown: a table keeps its cells apart."""

from __future__ import annotations

from moenas.markdown import table_lines


def test_a_cell_stays_one_cell() -> None:
    assert table_lines(("name", ""), [("a | b", "two\nlines"), (1, None)]) == [
        "| name |  |",
        "| --- | --- |",
        "| a \\| b | two lines |",
        "| 1 | None |",
    ]
