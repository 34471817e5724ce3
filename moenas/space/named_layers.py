"""The section `layers`: blocks and components that are written once and used by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from moenas.errors import suggestion
from moenas.grammar.component import Component, fields, join
from moenas.grammar.nodes import LAYERS
from moenas.model.architecture import Architecture
from moenas.resources import Node

KEY = "layer"
"""The key that names a layer in a mapping; fields beside it win over the layer's fields."""
ITEM = re.compile(r"\bblocks(\.choice\.\d+)?\.\d+(\.choice\.\d+)*$")
"""The path of a block in a list: a word there can be nothing but the name of a layer."""


def expand(architecture: Node, layers: Node | None) -> Node:
    """Return the architecture with the definition of each named layer in place of its name.

    The definition stays at its own place and path, so errors point there. Each of its holes has one
    name, `layers.NAME.FIELD`, however often the layer is used.

    Raises:
        SpaceError: at a name that is unknown, unused, the name of a kind, or inside itself.
    """
    expansion = _Expansion(_definitions(layers))
    expanded = expansion.node(architecture, "architecture", is_component=False)
    for name, definition in expansion.definitions.items():
        if name not in expansion.used:
            raise definition.error(
                join(LAYERS, name), "no block uses this layer; use it or delete it", key=True
            )
    return expanded


def _definitions(layers: Node | None) -> dict[str, Node]:
    """Return name -> definition of the section, each a mapping under a name of its own."""
    if layers is None or layers.value is None:
        return {}
    if not isinstance(layers.value, dict):
        raise layers.error(LAYERS, "write names with a block or a component: {local: {mixer: ...}}")
    known = kinds()
    for name, definition in layers.value.items():
        path = join(LAYERS, name)
        if name in known:
            raise definition.error(path, "a kind has this name; choose another one", key=True)
        if not name.isidentifier():
            raise definition.error(
                path, "a name has letters, digits and _, first a letter", key=True
            )
        if not isinstance(definition.value, dict):
            raise definition.error(path, f"{definition.plain!r} is not a block or a component")
    return layers.value


def _families() -> Iterator[type[Component]]:
    """Yield every family of components of an architecture."""
    waiting, seen = [Architecture], set[type[Component]]()
    while waiting:
        family: type[Component] = waiting.pop()
        if family in seen:
            continue
        seen.add(family)
        yield family
        for cls in [family, *family.kinds.values()]:
            waiting += [f.component for f in fields(cls).values() if f.component is not None]  # type: ignore[misc]


def kinds() -> set[str]:
    """Return the kinds of all families of components of an architecture."""
    return {kind for family in _families() for kind in family.kinds}


class _Expansion:
    """One walk over an architecture; it notes which layers are used."""

    def __init__(self, definitions: dict[str, Node]) -> None:
        self.definitions = definitions
        self.used: set[str] = set()
        self.inside: list[str] = []
        """Names of the layers around the current node."""
        self.kinds = kinds()
        self.component_keys = {
            name
            for family in _families()
            for cls in [family, *family.kinds.values()]
            for name, field in fields(cls).items()
            if field.component is not None
        }

    def node(self, node: Node, path: str, *, is_component: bool) -> Node:
        """Return a node with named layers put in; only components have names of layers."""
        if isinstance(node.value, list):
            items = enumerate(node.value)
            expanded = [self.node(x, join(path, i), is_component=is_component) for i, x in items]
            return replace(node, value=expanded)
        if isinstance(node.value, dict):
            return self._mapping(node, path, is_component=is_component)
        if not is_component or not isinstance(node.value, str) or node.value in self.kinds:
            return node
        near = suggestion(node.value, self.definitions)
        if node.value in self.definitions or near or ITEM.search(path):
            return replace(self._definition(node, path), key_mark=node.key_mark)
        return node

    def _mapping(self, node: Node, path: str, *, is_component: bool) -> Node:
        assert isinstance(node.value, dict)
        expanded = {}
        for key, value in node.value.items():
            inner = is_component if key == "choice" else key in self.component_keys
            expanded[key] = self.node(value, join(path, key), is_component=inner)
        if not is_component or KEY not in expanded:
            return replace(node, value=expanded)
        definition = self._definition(expanded.pop(KEY), join(path, KEY))
        assert isinstance(definition.value, dict)
        named = {
            key: replace(value, path=join(definition.path or "", key))
            for key, value in definition.value.items()
        }
        return replace(node, value={**named, **expanded})

    def _definition(self, name: Node, path: str) -> Node:
        """Return the definition that a node names, under its own path."""
        definition = self.definitions.get(str(name.value))
        if definition is None:
            near = suggestion(str(name.plain), self.definitions)
            known = ", ".join(self.definitions) or "none; the section `layers` defines them"
            raise name.error(path, f"no layer {name.plain!r}.{near} There are {known}.")
        key = str(name.value)
        if key in self.inside:
            raise name.error(path, f"the layer '{key}' is inside itself; write it out once")
        self.used.add(key)
        self.inside.append(key)
        own = join(LAYERS, key)
        expanded = self.node(definition, own, is_component=True)
        self.inside.pop()
        return replace(expanded, path=own)
