"""The names of fields that a requirement can use: suffixes of a field's path that no other has.

The path of a field is `architecture.d_model`, `block.mixer.scale` or `block.ffn.router.scale`. Its
suffixes are `block.mixer.scale`, `mixer.scale` and `scale`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache, reduce
from operator import or_
from typing import TypeVar

from moenas.grammar.component import Component, fields, join
from moenas.grammar.nodes import Choice, Fixed, Listing, Record, Tree

V = TypeVar("V")

WHOLE, LAYER = "architecture", "block"
"""First steps of the paths: of fields that all layers share, and of fields of one layer."""
OF_A_GROUP = (f"{LAYER}.repeat", f"{LAYER}.vary")
"""Fields of a group of layers, which no layer has."""


@cache
def suffixes(path: str) -> tuple[str, ...]:
    """Return the suffixes of a dotted path, the shortest first; the path itself is the last."""
    steps = path.split(".")
    return tuple(".".join(steps[-n:]) for n in range(1, len(steps) + 1))


def by_unique_suffix(values: Mapping[str, V]) -> dict[str, V]:
    """Return the values under every suffix that only one of the paths has."""
    return {suffix: values[path] for suffix, path in _names_of(tuple(values))}


@lru_cache(maxsize=1024)
def _names_of(paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return every suffix that only one of the paths has, with that path."""
    counts = Counter(suffix for path in paths for suffix in suffixes(path))
    return tuple(
        (suffix, path) for path in paths for suffix in suffixes(path) if counts[suffix] == 1
    )


def scalars(component: Component, path: str) -> dict[str, float | str]:
    """Return path -> value of the scalar fields of a component and of the components in it.

    A component of a family with kinds has its kind as value. Fields that are null are left out.
    """
    values: dict[str, float | str] = {}
    for name in fields(type(component)):
        value, inner = getattr(component, name), join(path, name)
        if isinstance(value, Component):
            values |= scalars(value, inner)
            if value.kind is not None:
                values[inner] = value.kind
        elif isinstance(value, str):
            values[inner] = value
        elif isinstance(value, bool | int | float):
            values[inner] = float(value) if isinstance(value, bool) else value
    return {inner: value for inner, value in values.items() if inner not in OF_A_GROUP}


def declared_paths(root: type[Component]) -> set[str]:
    """Return the paths of all fields that a component of a class can hold, and of those in it."""
    todo, seen = [(root, WHOLE)], set[tuple[type[Component], str]]()
    names = set[str]()
    while todo:
        cls, path = todo.pop()
        if (cls, path) in seen:
            continue
        seen.add((cls, path))
        todo += [(kind, path) for kind in cls.kinds.values()] if cls.kind is None else []
        for name, field in fields(cls).items():
            inner = join(path, name)
            if field.component is not None:
                todo.append((field.component, LAYER if field.is_list else inner))
            if field.component is None or field.component.kinds:
                names.add(inner)
    return names - set(OF_A_GROUP)


def former(root: type[Component]) -> dict[str, str]:
    """Return former name -> present place of the fields of all components inside a class."""
    todo, seen, former_places = [root], set[type[Component]](), dict[str, str]()
    while todo:
        cls = todo.pop()
        if cls not in seen:
            seen.add(cls)
            todo += list(cls.kinds.values()) if cls.kind is None else []
            todo += [f.component for f in fields(cls).values() if f.component is not None]
            places = cls.former.items()
            former_places |= {name: place for name, place in places if place != f"{name}.kind"}
    return former_places


def ambiguous(tree: Tree) -> dict[str, list[str]]:
    """Return every name that means several fields of a layer -> the shortest name of each.

    Options exclude one another, so a name that no two of them use together is not ambiguous.
    """
    counts, paths = _suffix_counts(tree, WHOLE), set[str]()
    _collect(tree, WHOLE, paths)
    places_by_name: dict[str, list[str]] = {}
    for path in sorted(paths):
        own = next((suffix for suffix in suffixes(path) if counts[suffix] == 1), path)
        for suffix in suffixes(path):
            if counts[suffix] > 1:
                places_by_name.setdefault(suffix, []).append(own)
    return places_by_name


def _suffix_counts(tree: Tree, path: str) -> Counter[str]:
    """Return for each suffix how many fields of one layer have it, at most."""
    if isinstance(tree, Choice):
        return reduce(or_, (_suffix_counts(option, path) for option in tree.options))
    if isinstance(tree, Listing):
        return reduce(or_, (_suffix_counts(item, LAYER) for item in tree.items))
    counts = Counter(suffixes(path))
    if isinstance(tree, Record):
        for name, value in tree.fields.items():
            if fields(tree.cls)[name].component is tree.cls and not isinstance(value, Fixed):
                return _suffix_counts(value, LAYER)  # a pattern, whose groups hold the fields
            counts += _suffix_counts(value, join(path, name))
    return counts


def _collect(tree: Tree, path: str, names: set[str]) -> None:
    """Add the path of every field of a tree."""
    if isinstance(tree, Choice):
        for option in tree.options:
            _collect(option, path, names)
    elif isinstance(tree, Listing):
        for item in tree.items:
            _collect(item, LAYER, names)
    else:
        names.add(path)
        for name, value in tree.fields.items() if isinstance(tree, Record) else ():
            _collect(value, join(path, name), names)
