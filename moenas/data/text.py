"""Text of the running Python or of the user: read, cleaned, split into training and validation."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moenas.data import domains, text_columns
from moenas.errors import DataError
from moenas.records import Plain
from moenas.resources import sha256

RULES = 1
"""Version of the rules by which text becomes a corpus; part of every manifest and cache key."""
SKIPPED = frozenset(
    [
        *("test", "tests", "site-packages", "dist-packages", "__pycache__", "lib-dynload"),
        *("lib2to3", "idlelib", "turtledemo", "ensurepip", "__phello__"),
        *("encodings", "pydoc_data"),
    ]
)
"""Folders of the standard library left out: no library code, bundled programs, tables."""
LICENCE = re.compile(rb"copyright|licen[cs]e|all rights reserved|warrant", re.IGNORECASE)
SHINGLE = 5
"""Lines in a shingle; two files share text where they share shingles."""
SHARED = 0.3
"""A file with more than this share of its shingles in earlier files is a near-duplicate."""
VAL_SHARE = 0.1
"""Share of the built-in files (by hash of their name) that validate: 5 to 10 % of the bytes."""
TAIL = 0.05
"""Share of validation text among anyone's files."""
GIVEN = "val is given"


Named = tuple[str, bytes]
"""A text and its name."""


@dataclass
class Text:
    """Text in two splits, and what is known of it."""

    name: str
    details: Plain = field(default_factory=dict)
    """Python version, what was left out."""
    rule: str = ""
    """How the splits were chosen."""
    train: list[bytes] = field(default_factory=list)
    val: list[bytes] = field(default_factory=list)
    domains: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "val": []})
    """Split -> the domain of each of its texts."""
    files: list[Plain] = field(default_factory=list)
    """A row for each file or topic: path, bytes and sha256 (as cleaned), split."""

    def add(self, name: str, text: bytes, split: str, domain: str) -> None:
        """Put a whole text into a split, with exactly one newline at its end."""
        self.note(name, text, split)
        self.domains[split].append(domain)
        (self.val if split == "val" else self.train).append(text.rstrip(b"\r\n") + b"\n")

    def note(self, name: str, text: bytes, split: str) -> None:
        """Write down where a text went."""
        row = {"path": name, "bytes": len(text), "sha256": sha256(text), "split": split}
        self.files.append(row)


def stdlib_sources() -> list[Named]:
    """Return (relative path, text) of the running Python's library, in order of path.

    Raises:
        DataError: if this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith("config-")]
        # `_sysconfigdata*` holds the settings of the build, with its paths.
        paths += [Path(folder, n) for n in names if n.endswith(".py") and n[:6] != "_sysco"]
    sources = sorted((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)
    if not sources:
        raise DataError(
            f"'stdlib' finds no Python sources in {root}; give {{files: [...]}}", path="data"
        )
    return sources


def digest(sources: list[Named]) -> str:
    """Return the digest of everything that a text is made of: rules, names, bytes."""
    hasher = hashlib.sha256(f"rules {RULES}".encode())
    for name, text in sources:
        hasher.update(f"\n{name}:{len(text)}\n".encode() + text)
    return hasher.hexdigest()


def stdlib(sources: list[Named]) -> Text:
    """Clean and split the library's sources: no licence headers, no near-duplicates."""
    clean = [(name, without_licence(text)) for name, text in sources]
    kept, dropped = without_near_duplicates(clean)
    size = sum(len(text) for _, text in sources)
    details = {
        "python": platform.python_version(),
        "read": {"files": len(sources), "bytes": size},
        "near_duplicates": dropped,
    }
    packages = domains.of_library([name for name, _ in kept])
    return _split_by_name(Text("stdlib", details), kept, packages)


def pydoc() -> Text:
    """Return the topics of Python's language reference, as `help('topic')` shows them.

    Topics quote one another: a paragraph that an earlier topic has is left out.

    Raises:
        DataError: if this Python came without them.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "'pydoc' needs pydoc_data, which this Python lacks; use stdlib", path="data"
        ) from None
    seen: set[bytes] = set()
    kept = []
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].encode().split(b"\n\n"):
            words = b" ".join(paragraph.split())
            if words and words not in seen:
                paragraphs.append(paragraph)
                seen.add(words)
        kept.append((name, b"\n\n".join(paragraphs)))
    kept = [(name, text) for name, text in kept if text]
    topic = {name: name for name, _ in kept}
    return _split_by_name(Text("pydoc", {"python": platform.python_version()}), kept, topic)


def files(paths: list[str], val: list[str] | None = None, *, is_utf8: bool = False) -> Text:
    """Return anyone's text, byte for byte; of files with equal content only the first counts.

    Content is equal, too, if only the line ends differ. The files `val` are the validation split;
    without them it is a part of the text. With `is_utf8` no character is cut in two.

    Raises:
        DataError: naming a file that cannot be read, or that is not UTF-8 where it must be.
    """
    train = _different(paths, is_utf8)
    if not val:
        return _split_by_size(Text("files"), train, is_utf8)
    text, held_out = Text("files", rule=GIVEN), _different(val, is_utf8)
    domain = domains.of_files([name for name, _ in [*train, *held_out]])
    for split, sources in (("train", train), ("val", held_out)):
        for name, part in sources:
            text.add(name, part, split, domain[name])
    return text


def _different(paths: list[str], is_utf8: bool) -> list[Named]:
    """Return the files of different content."""
    by_text: dict[bytes, Named] = {}
    for path in paths:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}", path="data") from None
        if is_utf8:
            require_utf8(path, text)
        by_text.setdefault(text.replace(b"\r\n", b"\n"), (path, text))
    return list(by_text.values())


def require_utf8(name: str, text: bytes) -> None:
    """Check that a text can be encoded with a tokenizer.

    Raises:
        DataError: naming the place of the first byte that is not UTF-8.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {error.start} is not UTF-8, which a tokenizer reads; convert the file",
            path="data",
        ) from None


def columns(paths: list[str], column: str, val: list[str] | None = None) -> Text:
    """Return the texts of a column of JSON Lines, Parquet or Arrow files; each row is a document.

    The files `val` are the validation split. Without them the digest of its text decides the split
    of a row, so that equal rows are in one split.

    Raises:
        DataError: naming file and row of what cannot be read.
    """
    rule = GIVEN if val else f"val if sha256(row) is in the lowest {TAIL:.0%}"
    text_read = Text("files", {"text_column": column}, rule)
    domain = domains.of_files([*paths, *(val or [])])
    for path, split in [
        *((path, "train") for path in paths),
        *((path, "val") for path in val or ()),
    ]:
        digest, size, count = hashlib.sha256(), 0, 0
        for row in text_columns.rows(path, column):
            text = row.encode("utf-8", "replace")
            low = split == "val" or (not val and text_columns.is_low(text, TAIL))
            (text_read.val if low else text_read.train).append(text.rstrip(b"\r\n") + b"\n")
            text_read.domains["val" if low else "train"].append(domain[path])
            digest.update(text + b"\n")
            size, count = size + len(text), count + 1
        text_read.files.append(
            {
                "path": path,
                "bytes": size,
                "rows": count,
                "sha256": digest.hexdigest(),
                "split": split if val else "both",
            }
        )
    return text_read


def without_licence(text: bytes) -> bytes:
    """Remove the licence header of a source file.

    Of the comments before the first line of code, every paragraph goes that speaks of copyright,
    licence, rights reserved or warranty.
    """
    lines = text.splitlines(keepends=True)
    kept: list[bytes] = []
    at = 0
    while at < len(lines) and lines[at].lstrip()[:1] in (b"", b"#"):
        end = at + 1
        while lines[at].strip() and end < len(lines) and lines[end].lstrip()[:1] == b"#":
            end += 1
        paragraph = lines[at:end]
        if not LICENCE.search(b"".join(paragraph)):
            kept += paragraph
        at = end
    return b"".join(kept + lines[at:]).lstrip(b"\r\n")


def without_near_duplicates(files: Iterable[Named]) -> tuple[list[Named], list[str]]:
    """Return the files to keep, and the names of those that repeat earlier ones.

    A shingle is 5 consecutive lines, blank ones left out and white space collapsed. A file is
    left out if earlier kept files, in order of name, have more than 30 % of its shingles.
    """
    seen: set[int] = set()
    kept, dropped = [], []
    for name, text in files:
        lines = [b" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if line]
        starts = range(max(1, len(lines) - SHINGLE + 1))
        shingles = {hash(tuple(lines[i : i + SHINGLE])) for i in starts}
        if not lines or len(shingles & seen) > SHARED * len(shingles):
            dropped.append(name)
            continue
        seen |= shingles
        kept.append((name, text))
    return kept, dropped


def _split_by_name(text: Text, sources: list[Named], domain: Mapping[str, str]) -> Text:
    """Split by the hash of a name, so that it stays in its split in every Python version."""
    text.rule = f"val if sha256(path) is in the lowest {VAL_SHARE:.0%}"
    for name, part in sources:
        low = int(sha256(name.encode())[:8], 16) < VAL_SHARE * 16**8
        text.add(name, part, "val" if low else "train", domain[name])
    return text


def _split_by_size(text: Text, sources: list[Named], is_utf8: bool = False) -> Text:
    """Split by file where that comes out at 5 to 20 % of the bytes, else by the tails of files."""
    total = sum(len(part) for _, part in sources)
    domain = domains.of_files([name for name, _ in sources])
    size, chosen = 0, set()
    for name, part in sorted(sources, key=lambda source: sha256(source[1])):
        if size < TAIL * total and size + len(part) <= 4 * TAIL * total:
            size += len(part)
            chosen.add(name)
    if size >= TAIL * total:
        text.rule = f"files in order of sha256 are val until it holds {TAIL:.0%}"
        for name, part in sources:
            text.add(name, part, "val" if name in chosen else "train", domain[name])
        return text
    text.rule = f"the last {TAIL:.0%} of each file is val"
    for name, part in sources:
        cut = len(part) - int(len(part) * TAIL)
        while is_utf8 and cut < len(part) and part[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        text.note(name, part, "both")
        text.train.append(part[:cut])
        text.val.append(part[cut:])
        for split in text.domains.values():
            split.append(domain[name])
    return text
