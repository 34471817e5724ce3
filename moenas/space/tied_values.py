"""Tied values: `{same_as: blocks.0.mixer.n_kv_heads}` has the value that is chosen there.

A tie is put in place before the architecture is read: the node that it names is used a second time.
Its hole has one name in both places, as a hole of a named layer has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moenas.errors import SourceLocation, SpaceError, suggestion
from moenas.grammar.component import join
from moenas.grammar.hole_reading import FIT, SAME_AS, hole_kind
from moenas.grammar.nodes import Range, Tree, walk
from moenas.resources import Node

ROOT = "architecture"


def check_tied_ranges(tree: Tree) -> None:
    """Refuse a tie between fields of which one takes other values of a range than the other.

    Raises:
        SpaceError: at the tie.
    """
    first: dict[str, Range] = {}
    for node in walk(tree):
        if not isinstance(node, Range) or not node.shared:
            continue
        known = first.setdefault(node.shared, node)
        if replace(known, mark=node.mark) != node:
            raise SpaceError(
                f"the field takes other steps than {node.shared}, to which it is tied; write a"
                " step there that both fields take",
                location=node.mark,
                path=f"{ROOT}.{node.shared}",
            )


def with_tied_values(architecture: Node) -> Node:
    """Return the architecture with the named value in place of each tie.

    Raises:
        SpaceError: at a path that names no value, or one that some architectures lack.
    """
    ties: list[tuple[Node, str]] = []
    _collect(architecture, ROOT, ties)
    targets = {_keys(node, path): _target(architecture, node, path) for node, path in ties}
    return _tied(architecture, (), targets) if targets else architecture


def _collect(node: Node, path: str, ties: list[tuple[Node, str]]) -> None:
    """Gather the ties of a tree with their paths."""
    path = node.path or path
    if isinstance(node.value, list):
        for i, item in enumerate(node.value):
            _collect(item, join(path, i), ties)
    elif isinstance(node.value, dict):
        if SAME_AS not in node.value:
            for key, value in node.value.items():
                _collect(value, join(path, key), ties)
            return
        for key, value in node.value.items():
            if key != SAME_AS:
                raise value.error(join(path, key), f"not allowed beside '{SAME_AS}'", key=True)
        ties.append((node, path))


def _keys(node: Node, path: str) -> tuple[str, ...]:
    """Return the keys of the path that a tie names, below the architecture."""
    assert isinstance(node.value, dict)
    named = node.value[SAME_AS]
    if not isinstance(named.value, str):
        raise named.error(
            join(path, SAME_AS),
            f"{named.plain!r} is not a path; write one such as blocks.0.mixer.n_kv_heads",
        )
    return tuple(named.value.removeprefix(f"{ROOT}.").split("."))


@dataclass(frozen=True)
class _Target:
    """The node that a tie names, and the name of its hole."""

    node: Node
    hole: str

    def at(self, tie: Node) -> Node:
        """Return the node for the place of a tie, so that errors point there."""
        assert isinstance(self.node.value, dict | str | int | float | bool | None)
        is_fit = isinstance(self.node.value, dict) and FIT in self.node.value
        node = self.node if is_fit else _marked(self.node, tie.mark)
        return replace(node, key_mark=tie.key_mark, hole=self.hole)


def _target(architecture: Node, tie: Node, path: str) -> _Target:
    """Return what a tie names.

    Raises:
        SpaceError: at the path, if it leads nowhere, or into what not every architecture has.
    """
    assert isinstance(tie.value, dict)
    named, place = tie.value[SAME_AS], join(path, SAME_AS)
    node, hole, walked = architecture, ROOT, ROOT
    for key in _keys(tie, path):
        if isinstance(node.value, dict) and hole_kind(node) is not None:
            raise named.error(
                place, f"{walked} is a choice, so not every architecture has a value below it"
            )
        if isinstance(node.value, dict) and _varies(node):
            raise named.error(place, f"{walked} has vary: true, so each of its layers has its own")
        known: dict[str, Node] = {}
        if isinstance(node.value, list):
            known = {str(i): item for i, item in enumerate(node.value)}
        elif isinstance(node.value, dict):
            known = node.value
        if key not in known:
            near = suggestion(key, known)
            written = ", ".join(known) or "none"
            raise named.error(
                place, f"{walked} has no {key!r} that is written.{near} There are {written}."
            )
        node = known[key]
        walked, hole = join(walked, key), node.path or join(hole, key)
    if isinstance(node.value, dict) and SAME_AS in node.value:
        raise named.error(place, f"{walked} is tied itself; name the value that it is tied to")
    if not _is_value(node):
        raise named.error(
            place, f"{walked} is no single value; the section `layers` shares whole parts"
        )
    return _Target(node, hole)


def _varies(node: Node) -> bool:
    assert isinstance(node.value, dict)
    return "vary" in node.value and node.value["vary"].value is not False


def _is_value(node: Node) -> bool:
    """Whether a node is a value, a hole for one, or a fit."""
    if not isinstance(node.value, dict):
        return not isinstance(node.value, list)
    if FIT in node.value:
        return True
    options = node.value["choice"].value if "choice" in node.value else []
    inner = options if isinstance(options, list) else []
    return hole_kind(node) is not None and not any(isinstance(x.value, dict | list) for x in inner)


def _marked(node: Node, mark: SourceLocation) -> Node:
    """Return a node with one place for all that is in it."""
    if isinstance(node.value, dict):
        return Node({key: _marked(x, mark) for key, x in node.value.items()}, mark, mark)
    if isinstance(node.value, list):
        return Node([_marked(x, mark) for x in node.value], mark, mark)
    return Node(node.value, mark, mark)


def _tied(node: Node, keys: tuple[str, ...], targets: dict[tuple[str, ...], _Target]) -> Node:
    """Return a tree in which ties are their values, and named values have names of their holes."""
    if keys in targets:
        return replace(node, hole=targets[keys].hole)
    if isinstance(node.value, list):
        items = [_tied(x, (*keys, str(i)), targets) for i, x in enumerate(node.value)]
        return replace(node, value=items)
    if not isinstance(node.value, dict):
        return node
    if SAME_AS in node.value:
        return targets[_keys(node, "")].at(node)
    inner = {key: _tied(x, (*keys, key), targets) for key, x in node.value.items()}
    return replace(node, value=inner)
