"""Spellings of a component: a bare word for a kind, presets, and former names of fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from moenas.errors import SourceLocation
from moenas.grammar.component import Component, Field, fields, join
from moenas.grammar.synonyms import hint
from moenas.records import Plain
from moenas.resources import Node, names_with

Inside = Callable[[str | None, str], bool]
"""Whether a kind of the component in a field has an inner field: (kind, inner field).

The kind of a family without kinds is None."""


def as_mapping(family: type[Component], node: Node) -> Node:
    """Return a bare word as a mapping: `bias` is `{kind: bias}`. Anything else stays as it is."""
    if isinstance(node.value, str) and family.kind is None and family.kinds:
        return replace(node, value={"kind": Node(node.value, node.mark)})
    return node


def apply_spellings(
    cls: type[Component], keys: dict[str, Node], path: str
) -> list[tuple[str, Field, Node]]:
    """Replace a preset and former names among the fields `found` of a component by what they mean.

    Returns:
        For each former name: the name, the field that it is now, and the value.

    Raises:
        SpaceError: if there is no such preset, or a field is given under both of its names.
    """
    # 1. The preset: it says which kinds the former names belong to.
    preset, mark = _take_preset(cls, keys, path)
    # 2. Former names: each moves to its place, next to what the file gives there.
    moved = []
    for name in [name for name in keys if name in cls.former and name not in fields(cls)]:
        node = keys.pop(name)
        _move(cls, keys, name, node, preset, path)
        moved.append((name, _present_field(cls, cls.former[name]), node))
    # 3. The rest of the preset: fields that are not given, also inside given components.
    for name, value in preset.items():
        if name not in keys:
            keys[name] = _located(value, mark)
        elif isinstance(value, dict):
            for inner, node in _located(value, mark).value.items():  # type: ignore[union-attr]
                if inner != "kind":
                    has = _inside(cls, name)
                    keys[name] = with_field(keys[name], inner, node, has, on_clash="keep")
    return moved


def _take_preset(
    cls: type[Component], keys: dict[str, Node], path: str
) -> tuple[Plain, SourceLocation | None]:
    """Take a `preset` key out of a mapping; return the fields that it sets, and its place."""
    if "preset" not in keys or "preset" in fields(cls):
        return {}, None
    preset = keys.pop("preset")
    if not isinstance(preset.value, str) or preset.value not in cls.presets:
        text = f"no preset {preset.plain!r}.{_near_preset(str(preset.plain), cls.presets)}"
        names = ", ".join(cls.presets) or "none"
        raise preset.error(join(path, "preset"), f"{text} There are {names}.")
    return cls.presets[preset.value], preset.mark


def _near_preset(word: str, presets: Mapping[str, Plain]) -> str:
    """Name the preset of nearly this name, or the published models whose names hold it."""
    spaces = [x for x in names_with("spaces", ".yaml", word) if f"/{word}" in x]
    if not spaces or any(word in name for name in presets):
        return hint(word, presets)
    return f" It is in {' and '.join(map(repr, spaces))}: see docs/zoo.md."


def _move(
    cls: type[Component],
    keys: dict[str, Node],
    name: str,
    node: Node,
    preset: Plain,
    path: str,
) -> None:
    """Put the value of a former field at its present place in `found`."""
    outer, _, inner = cls.former[name].partition(".")
    clash = node.error(
        join(path, name),
        f"is the former name of {cls.former[name]}, which is given, too; leave one of them out",
        key=True,
    )
    if not inner:
        if outer in keys:
            raise clash
        keys[outer] = node
        return
    if outer not in keys:
        spelled = preset.get(outer, fields(cls)[outer].default.kind)
        kind = spelled["kind"] if isinstance(spelled, dict) else spelled
        keys[outer] = Node({} if kind is None else kind, node.mark)
    keys[outer] = with_field(keys[outer], inner, node, _inside(cls, outer), on_clash=clash)


def _present_field(cls: type[Component], place: str) -> Field:
    """Return the field at a place: `field`, or `field.inner` of the first kind that has it."""
    outer, _, inner = place.partition(".")
    field = fields(cls)[outer]
    if not inner:
        return field
    assert field.component is not None, f"{cls.__name__}.{outer} holds no component"
    kinds = field.component.kinds.values() or [field.component]
    return next(fields(kind)[inner] for kind in kinds if inner in fields(kind))


def _inside(cls: type[Component], outer: str) -> Inside:
    """Return the test of whether a kind of the component in field `outer` has an inner field."""
    family = fields(cls)[outer].component
    assert family is not None, f"{cls.__name__}.{outer} holds no component"
    if not family.kinds:
        return lambda kind, inner: kind is None and inner in fields(family)
    return lambda kind, inner: kind in family.kinds and inner in fields(family.kinds[kind])


def with_field(
    node: Node, inner: str, value: Node, has: Inside, *, on_clash: Exception | Literal["keep"]
) -> Node:
    """Return a component, or a choice of components, with one more field in each kind that has it.

    A kind without the field stays as it is: there the value has no effect.
    """
    if isinstance(node.value, dict) and "choice" in node.value:
        options = node.value["choice"]
        if not isinstance(options.value, list):
            return node
        given = [with_field(o, inner, value, has, on_clash=on_clash) for o in options.value]
        return replace(node, value={**node.value, "choice": replace(options, value=given)})
    if not isinstance(node.value, str | dict):
        return node
    own = {"kind": node} if isinstance(node.value, str) else dict(node.value)
    kind: Any = own["kind"].value if "kind" in own else None
    if not isinstance(kind, str | None) or not has(kind, inner):
        return node
    if inner in own:
        if on_clash == "keep":
            return node
        raise on_clash
    return replace(node, value={**own, inner: value})


def present_name(name: str, former: Mapping[str, str]) -> str:
    """Return the dotted name of a field with the present places for former steps."""
    steps = (former.get(step, step).removesuffix(".kind") for step in name.split("."))
    return ".".join(steps)


def former_hole_name(name: str, former: Mapping[str, str]) -> str | None:
    """Return the name that a hole had when its field had its former name, or None.

    `router.balance.bias.rate` is the rate inside the option `bias` of a choice, and was
    `router.bias_rate`, as was `router.balance.rate`. The field may hold the component of the
    hole: `rope.scaling.yarn.factor` was `rope_scaling.yarn.factor`.
    """
    return _former_hole_name(name, tuple(former.items()))


@lru_cache(maxsize=4096)  # a sampler draws thousands of points, all with the same holes
def _former_hole_name(name: str, former: tuple[tuple[str, str], ...]) -> str | None:
    path, slash, unit = name.partition("/")
    steps = path.split(".")
    for before, place in former:
        *outer, inner = place.split(".")
        for end in (i for i in range(len(steps) - 1, -1, -1) if steps[i] == inner):
            for n_options in (0, 1) if outer else (0,):
                at = end - n_options - len(outer)
                if at >= 0 and steps[at : at + len(outer)] == outer:
                    return ".".join([*steps[:at], before, *steps[end + 1 :]]) + slash + unit
    return None


def _located(plain: Any, mark: SourceLocation | None) -> Node:
    """Give plain data one place."""
    mark = mark or SourceLocation("<preset>")
    if isinstance(plain, dict):
        return Node({key: _located(value, mark) for key, value in plain.items()}, mark)
    return Node(plain, mark)
