"""Numbers of a space file that must fit one another: layers, and positions against lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.counting import most_layers
from moenas.grammar.nodes import Choice, Fixed, Listing, Range, Record, Tree
from moenas.model.architecture import MAX_LAYERS
from moenas.space.objective import Objective
from moenas.space.sections import Protocol, Recipe


def require_layers(tree: Tree) -> None:
    """Refuse a space whose largest architecture has more layers than any may have.

    Raises:
        SpaceError: at the group that is too much.
    """
    for record in _records(tree):
        blocks, total = record.fields["blocks"], 0
        for item in blocks.items if isinstance(blocks, Listing) else [blocks]:
            total += most_layers(item)
            if total > MAX_LAYERS:
                raise SpaceError(
                    f"{total:,} layers, written out up to here; an architecture has at most"
                    f" {MAX_LAYERS:,}: lower a repeat",
                    location=item.mark,
                    path="architecture.blocks",
                )


def require_positions(
    tree: Tree, objectives: Sequence[Objective], train: Recipe, measure: Protocol
) -> None:
    """Refuse learned positions that are fewer than the tokens of a pass.

    Raises:
        SpaceError: at the number of positions.
    """
    asked = _lengths(objectives, train, measure)
    if not asked:
        return
    name = max(asked, key=lambda key: asked[key])
    for record in _records(tree):
        learned = any(value == "learned" for value, _ in _values(record.fields["positions"]))
        for value, mark in _values(record.fields["max_positions"]) if learned else ():
            if isinstance(value, int | float) and value < asked[name]:
                raise SpaceError(
                    f"{value:g} is less than the {asked[name]} tokens of a pass ({name}); give at"
                    f" least {asked[name]}, or shorten the pass",
                    location=mark,
                    path="architecture.max_positions",
                )


def _lengths(objectives: Sequence[Objective], train: Recipe, measure: Protocol) -> dict[str, int]:
    """Return the tokens of each pass that the objectives ask for, and what sets them."""
    needs = {objective.needs for objective in objectives}
    sources = "\n".join(objective.source for objective in objectives)
    lengths: dict[str, int] = {}
    if needs != {"cost"}:
        lengths["train.context"] = train.context
    if "decode_context" in sources or 'time("decode")' in sources:
        lengths["measure.decode_context + 1"] = measure.decode_context + 1
    if "prefill_tokens" in sources or 'time("prefill")' in sources:
        lengths["measure.prefill_tokens"] = measure.prefill_tokens
    return lengths


def _records(tree: Tree) -> Iterator[Record]:
    """Yield every architecture that a tree offers."""
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from _records(option)
    elif isinstance(tree, Record):
        yield tree


def _values(tree: Tree) -> Iterator[tuple[object, SourceLocation]]:
    """Yield every value of a scalar field; of a range, its low end."""
    if isinstance(tree, Choice):
        for option in tree.options:
            yield from _values(option)
    elif isinstance(tree, Range):
        yield tree.low, tree.mark
    elif isinstance(tree, Fixed):
        yield tree.value, tree.mark
