"""Rules for submitted spaces: no code and no file of the server, unless it was allowed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from moenas.errors import InputError, SpaceError
from moenas.records import Plain
from moenas.resources import Node, parse_yaml, shipped

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
SHIPPED_SPACE = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)?\Z")
MAGIC = re.compile(r"[*?\[]")
NO_CODE = "the server was started without --allow-code, so a space cannot name Python files"
NO_START = "'{}' is no shipped space, such as zoo/olmoe_1b_7b, and no study:NAME"
STUDY = "study:"


@dataclass(frozen=True)
class SpaceRules:
    """What the operator of a server allows."""

    allow_code: bool = False
    data_roots: tuple[str, ...] = ()
    """Absolute paths of folders."""


def require_allowed(text: str, source: str, overrides: tuple[str, ...], rules: SpaceRules) -> None:
    """Check what a space file and its overrides name, before any of it is opened or run.

    Raises:
        SpaceError: with line and column of what is not allowed, or of invalid YAML.
    """
    from moenas.space.overrides import override  # loads PyTorch; the API does not load it

    root = parse_yaml(text, source)
    if not isinstance(root.value, dict):
        return  # `Space.parse` says what is wrong
    for line in overrides:
        root = override(root, line)
    sections = cast(dict[str, Node], root.value)
    search = sections.get("search")
    searched = search.value if search is not None and isinstance(search.value, dict) else {}
    if not rules.allow_code:
        _require_no_code(sections, searched.get("sampler"))
    for i, node in enumerate(_items(searched.get("start_from"))):
        if isinstance(node.value, str) and not _is_start_name(node.value):
            raise node.error(f"search.start_from.{i}", NO_START.format(node.value))
    if (data := sections.get("data")) is not None:
        for path, node in _paths(data):
            _require_below(path, node, rules.data_roots)


def _require_no_code(sections: dict[str, Node], sampler: Node | None) -> None:
    """Refuse every way in which a space names a Python file."""
    use = sections.get("use")
    if use is not None and use.value not in (None, []):
        raise use.error("use", NO_CODE)
    for node in _items(sections.get("objectives")):
        if isinstance(node.value, str) and not WORD.match(node.value):
            raise node.error("objectives", f"'{node.value}' is no name; {NO_CODE}")
    if sampler is not None and isinstance(sampler.value, str) and not WORD.match(sampler.value):
        raise sampler.error("search.sampler", f"'{sampler.value}' is no name; {NO_CODE}")


def _items(node: Node | None) -> list[Node]:
    if node is None:
        return []
    return node.value if isinstance(node.value, list) else [node]


def require_start_names(refs: Sequence[str]) -> None:
    """Check names of architectures to start from, which must not be paths.

    Raises:
        InputError: naming the first that is neither a shipped space nor `study:NAME`.
    """
    for ref in refs:
        if not _is_start_name(ref):
            raise InputError(NO_START.format(ref[:200]))


def _is_start_name(ref: str) -> bool:
    if ref.startswith(STUDY):
        return True
    return bool(SHIPPED_SPACE.match(ref)) and (shipped("spaces") / f"{ref}.yaml").is_file()


def _paths(data: Node) -> Iterator[tuple[str, Node]]:
    """Yield the field and the node of each path of the section `data`."""
    if not isinstance(data.value, dict):
        return
    for key in ("files", "tokens", "val", "tokenizer"):
        for node in _items(data.value.get(key)):
            if isinstance(node.value, str) and node.value:
                yield f"data.{key}", node


def _require_below(path: str, node: Node, roots: tuple[str, ...]) -> None:
    """Refuse a path or a pattern outside of the folders; links are followed."""
    text = os.path.abspath(os.path.expanduser(str(node.value)))
    fixed = MAGIC.split(text, maxsplit=1)[0]
    if fixed != text:  # the folder in which the pattern begins
        fixed = os.path.dirname(fixed)
    if not is_below(fixed, roots):
        there = ", ".join(roots) if roots else "no folder; the server has no --data-root"
        raise node.error(path, f"'{node.value}' is not in a folder of --data-root: {there}")


def is_below(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a file lies in one of some folders, after all links are followed."""
    if "\0" in path:
        return False  # it names no file
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, base]) == base for base in map(os.path.realpath, roots))


def require_data_below(data: Plain, rules: SpaceRules) -> None:
    """Check the files that the patterns of a parsed section `data` match; a link may lead out.

    Raises:
        SpaceError: if one of them is outside of the folders.
    """
    from moenas.data.section import paths

    for path in paths(data):
        index = f"{os.path.splitext(path)[0]}.idx"  # of a Megatron data set
        for one in [path, *([index] if os.path.exists(index) else [])]:
            if not is_below(one, rules.data_roots):
                raise SpaceError(f"'{one}' is outside of --data-root", path="data")
