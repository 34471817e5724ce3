"""Overrides of a space file on the command line: `architecture.blocks.0.repeat=2`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from moenas.errors import SourceLocation, SpaceError
from moenas.resources import MAX_DEPTH, Node, parse_yaml
from moenas.space.named_layers import KEY, kinds


def override(root: Node, text: str) -> Node:
    """Return a copy of a space file in which one value is set by its dotted path.

    Below the name of a layer, the field is set in this use of the layer alone. Below a bare kind,
    it is set beside the kind.

    Raises:
        SpaceError: if the path leads nowhere.
    """
    place = SourceLocation(f"override '{text}'")
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise SpaceError("write it as section.field=value, e.g. train.tokens=2e6", location=place)
    keys = path.strip().split(".")
    if len(keys) > MAX_DEPTH:
        short = SourceLocation(f"{place.source[:60]}...")
        raise SpaceError(f"more than {MAX_DEPTH} levels deep", location=short)
    section = root.value.get("layers") if isinstance(root.value, dict) else None
    layers = section.value if section is not None and isinstance(section.value, dict) else {}
    return _set(root, keys, parse_yaml(value, place.source), place, layers)


def _set(
    node: Node, keys: list[str], value: Node, place: SourceLocation, layers: Mapping[str, Node]
) -> Node:
    """Return a copy of `node` in which the value at `keys` is replaced."""
    if not keys:
        return Node(value.value, place, place)
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(node.value):
            raise SpaceError(
                f"'{key}' is not a number from 0 to {len(node.value) - 1}", location=place
            )
        items = list(node.value)
        items[int(key)] = _set(items[int(key)], rest, value, place, layers)
        return replace(node, value=items)
    node = _as_mapping(node, layers)
    if not isinstance(node.value, dict):
        raise SpaceError(
            f"nothing can be set below {node.plain!r}; it is not a mapping", location=place
        )
    inner = node.value.get(key) or _defined(node.value, key, layers) or Node({}, place, place)
    return replace(node, value={**node.value, key: _set(inner, rest, value, place, layers)})


def _as_mapping(node: Node, layers: Mapping[str, Node]) -> Node:
    """Return the name of a layer, or a bare kind, as its mapping."""
    if isinstance(node.value, str) and node.value in layers:
        return replace(node, value={KEY: replace(node, key_mark=None)})
    if node.value is None:  # an empty section
        return replace(node, value={})
    if isinstance(node.value, str) and node.value in kinds():
        return replace(node, value={"kind": replace(node, key_mark=None)})
    return node


def _defined(keys: Mapping[str, Node], key: str, layers: Mapping[str, Node]) -> Node | None:
    """Return the value of a field in the definition of a layer that a mapping uses, or None."""
    seen = set[str]()  # a layer that uses itself is an error that is found later
    while KEY in keys and isinstance(name := keys[KEY].value, str) and name not in seen:
        seen.add(name)
        definition = layers.get(name)
        if definition is None or not isinstance(definition.value, dict):
            return None
        keys = definition.value
        if key in keys:
            return keys[key]
    return None
