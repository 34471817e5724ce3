"""Reads the sections of a space file beside the architecture, and the names of requirements."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

from moenas.errors import InputError, SourceLocation, SpaceError
from moenas.grammar import field_names, user_parts
from moenas.grammar import tree as grammar
from moenas.grammar.component import Component
from moenas.grammar.hole_reading import HOLES
from moenas.grammar.nodes import Tree
from moenas.grammar.requirements import LATENCIES, TRAINED, Requirement, parse_requirement
from moenas.grammar.user_parts import UserFile
from moenas.model.architecture import Architecture
from moenas.records import Cost
from moenas.resources import NOWHERE, Node
from moenas.space.objective import Objective, load_objective

MAX_NAME = 200

S = TypeVar("S", bound=Component)


def known_names() -> set[str]:
    """Return every name that a requirement may use: costs, and ends of the paths of fields."""
    paths = field_names.declared_paths(Architecture) | {f"{field_names.WHOLE}.n_layers"}
    return {
        *Cost().plain(),
        "total_params",
        *(suffix for path in paths for suffix in field_names.suffixes(path)),
    }


def read_name(node: Node | None, source: str) -> str:
    """Read the study's name; the file's name is the default."""
    if node is None:
        name = Path(source).stem
    elif isinstance(node.value, str):
        name = node.value
    else:
        raise node.error("name", f"{node.plain!r} is not text")
    name = unicodedata.normalize("NFC", name)
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        message = f"a study's name has 1 to {MAX_NAME} printable characters, not {name[:40]!r}"
        raise node.error("name", message) if node else InputError(f"{source}: {message}")
    return name


def read_section(cls: type[S], name: str, keys: dict[str, Node], source: str) -> S:
    """Read train, measure or search; holes are not allowed in them."""
    node = keys.get(name)
    if node is None or node.value is None:
        node = Node({}, node.mark if node else SourceLocation(source))
    _refuse_holes(node, name)
    return cast(S, grammar.construct(grammar.read(cls, node, name), name))


def _refuse_holes(node: Node, path: str) -> None:
    """Refuse a hole anywhere below a section."""
    for key, value in node.value.items() if isinstance(node.value, dict) else ():
        if isinstance(value.value, dict) and set(value.value) & set(HOLES):
            where = f"{path}.{key}"
            raise value.error(where, "a hole is not allowed here, only in 'architecture'")
        _refuse_holes(value, f"{path}.{key}")


def read_use(node: Node | None) -> Iterator[UserFile]:
    """Load the files of parts, so that the architecture can name them."""
    if node is None or node.value is None:
        return
    if not isinstance(node.value, list):
        raise node.error("use", "write a list of Python files: [./my_router.py]")
    for item in node.value:
        if not isinstance(item.value, str):
            raise item.error("use", f"{item.plain!r} is not the path of a Python file")
        try:
            yield user_parts.load(item.value)
        except InputError as error:
            raise item.error("use", str(error)) from None


def read_requirements(node: Node | None, tree: Tree) -> Iterator[Requirement]:
    """Yield the requirements; an error is at what is wrong."""
    if node is None or node.value is None:
        return
    if not isinstance(node.value, list):
        raise node.error("require", "write a list of comparisons: [active_params < 2e6]")
    known, ambiguous = known_names() | {*TRAINED, *LATENCIES}, field_names.ambiguous(tree)
    former = field_names.former(Architecture)
    for item in node.value:
        if not isinstance(item.value, str):
            raise item.error("require", f"{item.plain!r} is not a comparison in text")
        yield parse_requirement(item.value, item.mark, known, ambiguous, former)


def require_measured(requirements: Sequence[Requirement], objectives: Sequence[Objective]) -> None:
    """Refuse requirements on what is not measured.

    Raises:
        SpaceError: at the first requirement that needs another objective.
    """
    names = {objective.name for objective in objectives}
    untrained = all(objective.needs != "training" for objective in objectives)
    for requirement in requirements:
        if missing := sorted(requirement.names & LATENCIES.keys() - names):
            raise SpaceError(
                f"'{requirement.text}' is decided on the measured {missing[0]}; add {missing[0]} to"
                " the objectives",
                location=requirement.mark,
                path="require",
            )
        if untrained and requirement.trained:
            raise SpaceError(
                f"'{requirement.text}' is decided on the trained model, and no objective trains"
                " it; add val_loss to the objectives",
                location=requirement.mark,
                path="require",
            )


def read_objectives(node: Node) -> Iterator[Objective]:
    """Load the objectives by name or path; an error is at the one that is wrong."""
    if not isinstance(node.value, list) or not node.value:
        raise node.error("objectives", "write a list of at least one name: [val_loss, decode_ms]")
    seen: set[str] = set()
    for item in node.value:
        if not isinstance(item.value, str):
            raise item.error("objectives", f"{item.plain!r} is not the name of an objective")
        try:
            objective = load_objective(item.value)
        except InputError as error:
            raise item.error("objectives", str(error)) from None
        if objective.name in seen:
            raise item.error("objectives", f"duplicate objective '{objective.name}'")
        seen.add(objective.name)
        yield objective


def has_key(section: Node | None, key: str) -> bool:
    """Whether a section of the file has a key."""
    return section is not None and isinstance(section.value, dict) and key in section.value


def mark_of(section: Node | None, key: str) -> SourceLocation:
    """Return where a key of a section stands; NOWHERE if the file has no such section."""
    if section is None:
        return NOWHERE
    written = section.value if isinstance(section.value, dict) else {}
    return written[key].mark if key in written else section.mark
