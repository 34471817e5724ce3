"""The fields of a component that have an effect beside the others, and the order of drawing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

from moenas.grammar.component import Component, fields
from moenas.grammar.conditions import Scalar, Values


def word(value: Any) -> Scalar:
    """Return what a condition sees of a value: a scalar itself, of a component its kind.

    `value` is a component, its class, its plain data, a scalar or a list. A list is an empty word.
    """
    if isinstance(value, dict):
        return cast(Scalar, value.get("kind", ""))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = getattr(value, "kind", None)
    return kind if isinstance(kind, str) else ""


def has_effect(cls: type[Component], name: str, word_of: Callable[[str], Scalar]) -> bool:
    """Return whether a field has an effect; `word_of` gives the word of each other field.

    A field without effect counts for others as if it had its default.
    """
    return not any(
        all(effective_word(cls, other, word_of) in values for other, values in condition.items())
        for condition in fields(cls)[name].without_effect
    )


def effective_word(cls: type[Component], name: str, word_of: Callable[[str], Scalar]) -> Scalar:
    """Return the word of a field, or of its default if it has no effect."""
    if not fields(cls)[name].without_effect or has_effect(cls, name, word_of):
        return word_of(name)
    return word(fields(cls)[name].default)


def drawing_order(cls: type[Component]) -> tuple[str, ...]:
    """Return the fields in the order that they are drawn in: those that decide on others first.

    Other fields keep the order of their declaration.

    Raises:
        ValueError: if fields decide on one another in a circle, or a condition names no field.
    """
    return _drawing_order(cast(Any, cls))


@cache
def _drawing_order(cls: Any) -> tuple[str, ...]:
    known, order, open_fields = fields(cls), list[str](), list[str]()

    def place(name: str) -> None:
        if name in open_fields or name not in known:
            raise ValueError(f"{cls.__qualname__}.{open_fields[-1]}: a condition names {name!r}")
        open_fields.append(name)
        for condition in known[name].without_effect:
            for other in condition:
                if other not in order:
                    place(other)
        order.append(open_fields.pop())

    for name in known:
        if name not in order:
            place(name)
    return tuple(order)


def deciding_fields(cls: type[Component]) -> dict[str, list[Values]]:
    """Return the fields that decide on the effect of others, each with the sets that count."""
    return _deciding_fields(cast(Any, cls))


@cache
def _deciding_fields(cls: Any) -> dict[str, list[Values]]:
    deciding: dict[str, list[Values]] = {}
    for field in fields(cls).values():
        for condition in field.without_effect:
            for other, values in condition.items():
                sets = deciding.setdefault(other, [])
                if values not in sets:
                    sets.append(values)
    return deciding
