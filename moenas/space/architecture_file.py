"""One architecture from a file: a space file without holes, or the config.json of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from moenas.errors import SpaceError
from moenas.grammar import sampling
from moenas.grammar import tree as grammar
from moenas.grammar.nodes import Tree, fits
from moenas.model.architecture import Architecture
from moenas.resources import find, parse_yaml, read_text
from moenas.space.named_layers import expand
from moenas.space.section_reading import read_use
from moenas.space.tied_values import with_tied_values

CONFIG = "config.json"
"""The file of an export that holds its architecture."""


@dataclass(frozen=True)
class ArchitectureFile:
    """An architecture as it is written in a file."""

    tree: Tree
    """Its values, each with its place in the file."""
    architecture: Architecture
    """In canonical form."""


def read_architecture(ref: str) -> ArchitectureFile:
    """Read an architecture: a name such as `zoo/olmoe_1b_7b`, a path, or the folder of an export.

    Only the sections `use`, `layers` and `architecture` of a space file are read.

    Raises:
        SpaceError: with file, line and column of a hole, or of what is wrong.
        NotFoundError: if there is no such file.
    """
    path = Path(ref).expanduser()
    if (path / CONFIG).is_file():
        path /= CONFIG
    elif path.suffix != ".json":
        path = find("spaces", ".yaml", ref)
    root = parse_yaml(read_text(path), str(path))
    if not isinstance(root.value, dict) or "architecture" not in root.value:
        raise root.error("", "the section 'architecture' is missing")
    tuple(read_use(root.value.get("use")))  # loads the files of parts
    written = with_tied_values(expand(root.value["architecture"], root.value.get("layers")))
    tree = grammar.read(Architecture, written, "architecture")
    for hole in sampling.holes(tree):
        raise SpaceError(
            "a hole; an architecture to start from has a value in its place",
            location=hole.tree.mark,
            path=f"architecture.{hole.name}",
        )
    for fit in fits(tree):
        raise SpaceError(
            "a fit; an architecture to start from has a width in its place",
            location=fit.mark,
            path=fit.path,
        )
    architecture = cast(Architecture, sampling.drawn(tree, sampling.RandomSuggest(0)))
    return ArchitectureFile(tree, architecture.canonical())
