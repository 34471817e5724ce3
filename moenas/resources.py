"""From a name or a path to the thing: strict YAML, shipped files, modules loaded by path."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import linecache
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import yaml

from moenas.errors import InputError, NotFoundError, SourceLocation, SpaceError, suggestion

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
MAX_DIGITS = 40

listener: Callable[[str], None] | None = None
"""Is told which files of the working directory are used by their names."""
_told: set[Path] = set()


NOWHERE = SourceLocation("")
"""The place of plain data."""
Value: TypeAlias = "bool | int | float | str | dict[str, Node] | list[Node] | None"


@dataclass(frozen=True)
class Node:
    """A value of a YAML file (or of plain data) together with where it was written."""

    value: Value
    mark: SourceLocation
    key_mark: SourceLocation | None = None
    """Where the key stands, if the node is the value of one."""
    path: str | None = None
    """The path of the definition that replaces a name here."""
    hole: str | None = None
    """The path that names the hole here, if other places have the same hole."""

    @property
    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value

    @classmethod
    def wrap(cls, plain: Any, mark: SourceLocation = NOWHERE) -> Node:
        """Give all of some plain data one place, so that one reader serves files and data."""
        if isinstance(plain, dict):
            return cls({str(k): cls.wrap(v, mark) for k, v in plain.items()}, mark)
        if isinstance(plain, list | tuple):
            return cls([cls.wrap(v, mark) for v in plain], mark)
        return cls(plain, mark)

    def error(self, path: str, message: str, *, key: bool = False) -> SpaceError:
        """Build the error for this place, or for the place of the node's key."""
        mark = self.key_mark if key and self.key_mark else self.mark
        return SpaceError(message, location=mark, path=path)


# YAML 1.2 core schema. PyYAML's 1.1 rules would read `1e-3` as text, `no` as False, `012` as 10.
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


def scalar(text: str) -> bool | int | float | str | None:
    """Read an unquoted YAML scalar by the rules of YAML 1.2 (`1e6` and `1_000` are numbers)."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.match(text) and len(text) <= MAX_DIGITS:
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text)
    return text


class _Composer:
    """Turns PyYAML's events into Nodes; refuses whatever a space file has no use for."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.events = iter(yaml.parse(text, Loader=yaml.SafeLoader))

    def mark(self, event: yaml.Event) -> SourceLocation:
        start = event.start_mark
        assert start is not None
        return SourceLocation(self.source, start.line + 1, start.column + 1)

    def document(self) -> Node:
        next(self.events)  # stream start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            raise SpaceError("the file is empty", location=SourceLocation(self.source, 1, 1))
        node = self.compose(next(self.events), 0)
        next(self.events)  # document end
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise SpaceError("a second document; write one per file", location=self.mark(event))
        return node

    def compose(
        self, event: yaml.Event, depth: int, key_mark: SourceLocation | None = None
    ) -> Node:
        mark = self.mark(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SpaceError(
                "anchors and aliases (& and *) are not allowed; repeat the value", location=mark
            )
        if getattr(event, "tag", None):
            raise SpaceError("tags (!) are not allowed; write the plain value", location=mark)
        if depth > MAX_DEPTH:
            raise SpaceError(TOO_DEEP, location=mark)
        if isinstance(event, yaml.ScalarEvent):
            value = scalar(event.value) if event.style is None else event.value
            return Node(value, mark, key_mark)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(list(self.items(depth)), mark, key_mark)
        return Node(self.mapping(depth), mark, key_mark)

    def items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.compose(event, depth + 1)

    def mapping(self, depth: int) -> dict[str, Node]:
        merged: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            mark = self.mark(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise SpaceError("a key must be a word", location=mark)
            self.compose(event, depth)  # refuses anchors and tags on keys
            if event.value in merged:
                raise SpaceError(f"duplicate key '{event.value}'", location=mark)
            merged[event.value] = self.compose(next(self.events), depth + 1, mark)
        return merged


def parse_yaml(text: str, source: str) -> Node:
    """Read one YAML document strictly.

    YAML 1.2 scalars; no tags, anchors, aliases or duplicate keys; at most 1 MiB and 64 levels.

    Raises:
        SpaceError: with file, line and column of the first thing that is wrong.
    """
    file = SourceLocation(source)
    if len(text) > MAX_BYTES:
        raise SpaceError("larger than 1 MiB; a space file is a few hundred lines", location=file)
    try:
        return _Composer(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = SourceLocation(source, mark.line + 1, mark.column + 1) if mark else file
        what = error.problem or error.context
        raise SpaceError(f"not valid YAML: {what}", location=place) from None
    except yaml.reader.ReaderError as error:
        raise SpaceError(f"not valid YAML: {error.reason}", location=file) from None
    except RecursionError:
        raise SpaceError(TOO_DEEP, location=file) from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file; raise InputError that names it if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `parse_yaml` reads back."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote text that YAML 1.2 reads as a number, such as 1e5; PyYAML quotes by YAML 1.1."""
    style = None if isinstance(scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(plain: Any) -> str:
    """Write plain data as YAML, in the order given; `parse_yaml` reads the same data back."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def shipped(folder: str) -> Path:
    """Return where the files of `spaces`, `objectives` or `dashboards` that came with moenas lie.

    That is `moenas/_shipped/<folder>` in an installed wheel and `<folder>` beside the package in
    a checkout.
    """
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


SUGGESTED = 3
"""Most names of files in subfolders that an error suggests."""


def listing(folder: str, suffix: str) -> dict[str, Path]:
    """Return name -> path of the files of `folder`; the folder here shadows the shipped one."""
    paths: dict[str, Path] = {}
    for place in (shipped(folder), Path(folder)):
        for path in sorted(place.glob(f"*{suffix}")):
            if not path.name.startswith(("_", ".")):
                paths[path.stem] = path
    return paths


def find(folder: str, suffix: str, ref: str) -> Path:
    """Resolve a reference: a path as given, then the folder here, then the shipped folder.

    A name may lead into a folder below, like `zoo/mixtral_8x7b`. The folder may be left out where
    only one folder below has the name.

    Raises:
        NotFoundError: naming what there is, with the nearest name.
    """
    path = Path(ref).expanduser()
    parent, slash, _ = ref.rpartition("/")
    known: dict[str, Path] = {}
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        if (path.suffix == suffix or slash) and path.is_file():
            return path
        known = {} if path.is_absolute() else _named(folder, suffix, parent)
    if ref in known:
        return take(known[ref], folder)
    if path.suffix == suffix or (slash and not known):
        raise NotFoundError(f"{_short(ref)}: no such file")
    below = [] if slash else _below(folder, suffix)
    same = [name for name in below if name.rpartition("/")[2] == ref]
    if len(same) == 1:
        return find(folder, suffix, same[0])
    inside = [name for name in below if name.startswith(f"{ref}/")]
    if inside or not ref.removeprefix(parent + slash):
        names = ", ".join(inside or known)
        raise NotFoundError(f"'{_short(ref)}' is a folder of {folder}/; name one of: {names}")
    holding = [] if slash else names_with(folder, suffix, ref)
    near = f" Did you mean {' or '.join(map(repr, holding))}?" if holding else ""
    names = ", ".join(known) or "none"
    raise NotFoundError(
        f"no '{_short(ref)}' in {folder}/.{near or suggestion(ref, known)} There are: {names}."
        f" A path must end in {suffix}."
    )


def _named(folder: str, suffix: str, parent: str) -> dict[str, Path]:
    """Return name -> path of what `folder` offers in a folder below it, or in itself."""
    if not parent:
        return listing(folder, suffix)
    paths = listing(f"{folder}/{parent}", suffix)
    return {f"{parent}/{name}": place for name, place in paths.items()}


def _below(folder: str, suffix: str) -> list[str]:
    """Return the names in the folders right below `folder`."""
    places = [place for root in (shipped(folder), Path(folder)) for place in root.glob("*/")]
    parents = sorted({place.name for place in places if not place.name.startswith(("_", "."))})
    return [name for parent in parents for name in _named(folder, suffix, parent)]


def names_with(folder: str, suffix: str, word: str) -> list[str]:
    """Return at most SUGGESTED names in the folders right below `folder` that hold a word."""
    below, spelt = _below(folder, suffix), _spelt(word)
    return [x for x in below if spelt and spelt in _spelt(x.rpartition("/")[2])][:SUGGESTED]


def _spelt(name: str) -> str:
    """Return a name without what spellings differ in: case, hyphens, dots and underscores."""
    return re.sub(r"[-_. ]", "", name).lower()


def take(path: Path, folder: str) -> Path:
    """Return a file that was found by its name; check and tell of one of the folder here.

    A folder of the working directory comes before the shipped one, and its Python files are run.
    So a file counts only if nobody but this user, or root, can have put it there.

    Raises:
        InputError: if another user can have.
    """
    if path.resolve().is_relative_to(shipped(folder).resolve()):
        return path
    reason = foreign(path)
    if reason:
        raise InputError(f"{path}: {reason}; give its whole path, or run moenas elsewhere")
    if listener is not None and path.absolute() not in _told:
        _told.add(path.absolute())
        listener(f"using {path} of this folder")
    return path


def foreign(path: Path) -> str | None:
    """Say how another user may have written a file, or return None."""
    trusted = (os.geteuid(), 0)
    for place in (path, path.parent):
        file_stat = place.stat()
        if file_stat.st_uid not in trusted:
            return f"belongs to another user (uid {file_stat.st_uid})"
        sticky = place is not path and file_stat.st_mode & stat.S_ISVTX
        if file_stat.st_mode & stat.S_IWOTH and not sticky:
            what = "is" if place is path else "lies in a folder that is"
            return f"{what} writable by every user"
    return None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 digest."""
    return hashlib.sha256(data).hexdigest()


def load_module(path: Path, source: str | None = None) -> ModuleType:
    """Load a Python file by path (or its given source text) under a private module name.

    Nothing in the three folders is imported by name: two files of one name in two places stay
    two modules.

    Raises:
        InputError: naming file and line, if the file does not run.
    """
    text = read_text(path) if source is None else source
    name = f"_moenas_user_{path.stem}_{sha256(text.encode())[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    try:
        code = compile(text, str(path), "exec", dont_inherit=True)
        sys.modules[name] = module
        # Tracebacks and exports find the text even where the file is missing.
        linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
        exec(code, module.__dict__)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}:{error.offset}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise InputError(f"{path}: {_line(error, str(path))}{error!r}") from error
    return module


def _line(error: BaseException, source: str) -> str:
    """Say in which line of `source` an exception was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""
