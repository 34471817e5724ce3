"""Fields of a space file that have no effect beside the other fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from moenas.errors import SourceLocation, SpaceError
from moenas.grammar.component import Field, fields, join
from moenas.grammar.conditions import Scalar
from moenas.grammar.nodes import Fixed, Listing, Record, Tree, has_holes
from moenas.grammar.sampling import RandomSuggest, drawn, holes_without_effect
from moenas.model.architecture import Architecture


def without_effect(tree: Tree) -> list[str]:
    """Return a warning, with file, line and column, for each written field without effect.

    A field has no effect if every other value that is valid gives the same canonical architecture.
    Of a space with holes these are holes that no draw asks for; another field may count in a draw.
    """
    if has_holes(tree) or not isinstance(tree, Record):
        return [
            f"{hole.tree.mark}: architecture.{hole.name}: the hole has no effect beside the other"
            " fields, and is not drawn; leave it out"
            for hole in holes_without_effect(tree)
        ]
    wanted, unused = _fingerprint(tree), []
    written = {value.mark: (record, name, value) for record, name, value in _written(tree)}
    for record, name, value in written.values():
        field = fields(record.cls)[name]
        if value.value == field.default:
            continue
        others = [_fingerprint(_with(tree, value, other)) for other in _others(field, value.value)]
        valid = [fingerprint for fingerprint in others if fingerprint is not None]
        if valid and all(fingerprint == wanted for fingerprint in valid):
            path = join(record.path, name)
            unused.append(
                f"{value.mark}: {path}: has no effect beside the other fields; leave it out"
            )
    return unused


def _written(tree: Tree) -> Iterator[tuple[Record, str, Fixed]]:
    """Yield the scalar fields that the user wrote; fields of a preset or a default share a
    place."""
    if isinstance(tree, Listing):
        for item in tree.items:
            yield from _written(item)
    if not isinstance(tree, Record):
        return
    places = Counter[SourceLocation](value.mark for value in tree.fields.values())
    for name, value in tree.fields.items():
        if isinstance(value, Fixed) and places[value.mark] == 1 and value.mark != tree.mark:
            yield tree, name, value
        yield from _written(value)


def _others(field: Field, value: Scalar) -> list[Scalar]:
    """Return some other values that the field accepts by itself."""
    tried: list[Scalar] = [*field.choices, field.default, True, False]
    if isinstance(value, int | float) and not isinstance(value, bool):
        tried += [value * 2, value + 1, value / 2, value + (field.multiple or 0)]
    return [
        field.convert(x)
        for x in tried
        if x is not None and x != value and field.error_for(x) is None  # null may spell the value
    ]


def _with(tree: Tree, old: Fixed, value: Scalar) -> Tree:
    """Return a tree with another value in one place of the file, which a named layer may share."""
    if isinstance(tree, Fixed) and tree.mark == old.mark:
        return replace(tree, value=value)
    if isinstance(tree, Listing):
        return replace(tree, items=tuple(_with(item, old, value) for item in tree.items))
    if isinstance(tree, Record):
        return replace(tree, fields={n: _with(x, old, value) for n, x in tree.fields.items()})
    return tree


def _fingerprint(tree: Tree) -> str | None:
    """Return the fingerprint of an architecture without holes, or None if it is not valid."""
    try:
        architecture = drawn(tree, RandomSuggest(0))
    except SpaceError:
        return None
    assert isinstance(architecture, Architecture)
    return architecture.fingerprint
