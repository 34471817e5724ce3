"""Streams of tokens: corpora that every Python has, the user's text files, and token arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from glob import glob
from pathlib import Path

import numpy as np

from moenas import formats
from moenas.data import text as texts
from moenas.data.bigram import bigram_loss
from moenas.data.corpus import Corpus
from moenas.data.domains import Domains, table
from moenas.data.entropy import CHUNK, MAX_ORDER_1, Counts, Tokens
from moenas.data.text import Text
from moenas.errors import DataError, suggestion
from moenas.records import Plain
from moenas.resources import Node, sha256

DTYPES = ("uint8", "uint16", "uint32")
KEYS = {
    "stdlib": ("kind",),
    "pydoc": ("kind",),
    "files": ("kind", "files"),
    "tokens": ("kind", "tokens", "val", "vocab_size", "dtype"),
}
WANTED = (
    "give stdlib, pydoc, {files: [paths or patterns]} or {tokens: path, vocab_size: n}"
    " with an optional {val: path, dtype: uint16 or uint32}"
)
TAIL = 0.05
"""Share of one array of tokens, at its end, that validates."""


# --- the data section --------------------------------------------------------------------------


def parse(node: Node) -> Plain:
    """Read the `data` section of a space file; what comes back reads as itself again.

    `stdlib` and `pydoc` become {"kind": ...}; paths become absolute (relative ones start from
    the folder where moenas runs), patterns the sorted files that they match.

    Raises:
        SpaceError: `file:line:column: data: what is wrong; what would be right`.
    """
    value = node.value
    if isinstance(value, str):
        value = {"kind": node}
    if not isinstance(value, dict):
        raise node.error("data", f"{node.plain!r} is no corpus; {WANTED}")
    kind = _kind(node, value)
    for key, inner in value.items():
        if key not in KEYS[kind]:
            near, known = suggestion(key, KEYS[kind]), ", ".join(KEYS[kind])
            raise inner.error(
                f"data.{key}", f"no key of '{kind}' data.{near} It takes {known}.", key=True
            )
    if kind == "files":
        return {"kind": kind, "files": _parse_files(_need(node, value, "files", "a list of paths"))}
    if kind == "tokens":
        return _parse_tokens(node, value)
    return {"kind": kind}


def _kind(node: Node, value: dict[str, Node]) -> str:
    """Return which of the four kinds of corpus is meant."""
    if "kind" in value:
        kind = value["kind"]
        if not isinstance(kind.value, str) or kind.value not in KEYS:
            near = suggestion(str(kind.plain), KEYS)
            raise kind.error("data", f"no corpus {kind.plain!r}.{near} Right would be: {WANTED}")
        return kind.value
    named_kind = next((kind for kind in ("files", "tokens") if kind in value), None)
    if named_kind is None:
        keys = ", ".join(value) or "nothing"
        near = next(filter(None, (suggestion(key, KEYS) for key in value)), "")
        raise node.error("data", f"names no corpus ({keys}).{near} Right would be: {WANTED}")
    return named_kind


def _need(node: Node, value: dict[str, Node], key: str, wanted: str) -> Node:
    if key not in value:
        raise node.error("data", f"'{key}' is missing; give {wanted}")
    return value[key]


def _parse_files(node: Node) -> list[str]:
    """Return the absolute paths of every file named or matched, each once, sorted."""
    items = node.value if isinstance(node.value, list) else [node]
    patterns: set[str] = set()
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            raise item.error("data.files", f"{item.plain!r} is not a path or a pattern")
        text = os.path.abspath(os.path.expanduser(item.value))
        matched = [text] if os.path.exists(text) else sorted(glob(text, recursive=True))
        paths = [path for path in matched if not os.path.isdir(path)]
        if not paths:
            reason = f"is a folder; give '{item.value}/*'" if matched else "matches no file"
            raise item.error("data.files", f"'{item.value}' {reason}")
        for path in paths:
            _check_readable(item, "data.files", path)
        patterns.update(paths)
    if not patterns:
        raise node.error("data.files", "is empty; give at least one path or pattern")
    return sorted(patterns)


def _check_readable(node: Node, key: str, path: str) -> None:
    if not os.path.isfile(path):
        raise node.error(key, f"'{path}' is not a plain file")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise node.error(key, f"'{path}' cannot be read: {error.strerror}") from None
    if not head:
        raise node.error(key, f"'{path}' is empty")
    if (what := formats.container(head)) is not None and not path.endswith(".npy"):
        raise node.error(key, f"'{path}' is {what}")


def _parse_tokens(node: Node, value: dict[str, Node]) -> Plain:
    """Read {tokens, val, vocab_size, dtype}: one array, two arrays, or a folder with both."""
    size = _need(node, value, "vocab_size", "the number of different tokens")
    number = size.value if isinstance(size.value, int | float) else 0
    if number < 2 or not float(number).is_integer():
        raise size.error("data.vocab_size", f"{size.plain!r} is not a whole number of at least 2")
    vocab_size = int(number)
    tokens = _need(node, value, "tokens", "the path of an array of tokens (.npy, or raw)")
    train = _token_path(tokens, "data.tokens")
    val_node = value.get("val")
    val = None
    if val_node is not None and val_node.value is not None:
        val = _token_path(val_node, "data.val")
    if os.path.isdir(train):
        train, val = _token_pair(tokens, train)
    named = value.get("dtype")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if named is not None:
        if named.value not in DTYPES:
            near, known = suggestion(str(named.plain), DTYPES), ", ".join(DTYPES)
            raise named.error("data.dtype", f"{named.plain!r} is not one of {known}.{near}")
        dtype = str(named.value)
    dtype = _check_tokens(tokens, train, dtype, given=named is not None)
    if val is not None:
        _check_tokens(val_node or tokens, val, dtype, given=True)
    section = {"kind": "tokens", "tokens": train, "vocab_size": vocab_size, "dtype": dtype}
    return section if val is None else {**section, "val": val}


def _token_path(node: Node, key: str) -> str:
    if not isinstance(node.value, str) or not node.value:
        raise node.error(key, f"{node.plain!r} is not a path")
    path = os.path.abspath(os.path.expanduser(node.value))
    if not os.path.exists(path):
        raise node.error(key, f"'{node.value}' does not exist (looked at {path})")
    return path


def _token_pair(node: Node, folder: str) -> tuple[str, str]:
    """Find train.bin and val.bin, or train.npy and val.npy, in a folder."""
    for suffix in ("bin", "npy"):
        pair = [os.path.join(folder, f"{split}.{suffix}") for split in ("train", "val")]
        if all(map(os.path.isfile, pair)):
            return pair[0], pair[1]
    raise node.error(
        "data.tokens", f"'{folder}' has no train.bin and val.bin (or .npy); give the array's path"
    )


def _check_tokens(node: Node, path: str, dtype: str, *, given: bool) -> str:
    """Check the form of an array of tokens and return its dtype: that of a .npy is in it."""
    _check_readable(node, "data.tokens", path)
    if not path.endswith(".npy"):
        if os.path.getsize(path) % np.dtype(dtype).itemsize:
            size = os.path.getsize(path)
            raise node.error("data.tokens", f"'{path}' has {size} bytes, not whole {dtype} numbers")
        return dtype
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise node.error("data.tokens", f"'{path}' is no .npy array: {error}") from None
    if array.ndim != 1 or array.dtype.name not in DTYPES or (given and array.dtype.name != dtype):
        wanted = dtype if given else " or ".join(DTYPES)
        raise node.error(
            "data.tokens",
            f"'{path}' holds {array.dtype.name} in shape {array.shape}; give one row of {wanted}",
        )
    return str(array.dtype.name)


# --- loading -----------------------------------------------------------------------------------


def load(section: Plain) -> Corpus:
    """Return the corpus that a section, as `parse` gives it, describes.

    Raises:
        DataError: if a file has become unreadable, or a token is outside the vocabulary.
    """
    kind = section["kind"]
    if kind == "tokens":
        return _load_tokens(section)
    if kind == "files":
        return _text_corpus(texts.files(section["files"]))
    return _load_stdlib() if kind == "stdlib" else _text_corpus(texts.pydoc())


def _load_stdlib() -> Corpus:
    """Return the Python library's sources as a corpus; from the cache if it is there."""
    sources = texts.stdlib_sources()
    place = cache_folder() / f"stdlib-{texts.digest(sources)[:32]}"
    corpus = _read_cache(place)
    if corpus is None:
        corpus = _text_corpus(texts.stdlib(sources))
        _write_cache(place, corpus)
    return corpus


def _text_corpus(text: Text) -> Corpus:
    """Assemble a corpus of bytes."""
    train = np.frombuffer(b"".join(text.train), dtype=np.uint8)
    val = np.frombuffer(b"".join(text.val), dtype=np.uint8)
    counts = Counts(256)
    for split in (train, val):
        counts.add(split)
    manifest = {
        "name": text.name,
        "sha256": counts.sha256,
        "rules": texts.RULES,
        "split": text.rule,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "vocab_size": 256,
        "is_bytes": True,
        "entropy": counts.entropy(),
        "bigram_loss": bigram_loss(train, val, 256),
        **text.details,
        "domains": table(
            {
                split: list(zip(text.domains[split], map(len, parts), strict=True))
                for split, parts in (("train", text.train), ("val", text.val))
            }
        ),
        "files": text.files,
    }
    return from_manifest(manifest, train, val)


def from_manifest(manifest: Plain, train: Tokens, val: Tokens) -> Corpus:
    """Return a corpus of two splits that a manifest describes."""
    return Corpus(
        name=manifest["name"],
        train=train,
        val=val,
        vocab_size=manifest["vocab_size"],
        is_bytes=manifest["is_bytes"],
        sha256=manifest["sha256"],
        entropy=manifest["entropy"],
        bigram_loss=manifest["bigram_loss"],
        manifest=manifest,
        domains=Domains.parse(manifest["domains"]) if manifest["domains"] else None,
    )


# --- arrays of tokens --------------------------------------------------------------------------


def _load_tokens(section: Plain) -> Corpus:
    """Map arrays of tokens into memory.

    They are read whole, so that their digest is that of what is in them now; what was counted is
    kept under that digest.
    """
    dtype, vocab_size = section["dtype"], section["vocab_size"]
    paths = [section["tokens"]] + ([section["val"]] if section.get("val") else [])
    try:
        arrays = [_map(path, dtype) for path in paths]
        files = [{"path": p, "bytes": os.path.getsize(p)} for p in paths]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{error}; it was readable when the space was checked", path="data"
        ) from None
    cut = 0
    if len(arrays) == 1:
        cut = len(arrays[0]) - int(len(arrays[0]) * TAIL)
        arrays = [arrays[0][:cut], arrays[0][cut:]]
    stamps = [os.stat(path) for path in paths]
    now = tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stamps)
    if now not in _DIGESTS:
        _DIGESTS[now] = digest_of(arrays)
    key = json.dumps([texts.RULES, section, files, _DIGESTS[now]], sort_keys=True)
    place = cache_folder() / f"tokens-{sha256(key.encode())[:32]}.json"
    try:
        return from_manifest(json.loads(place.read_text()), arrays[0], arrays[1])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    counts = Counts(vocab_size)
    counts.add(arrays[0], paths[0])
    counts.add(arrays[1], paths[-1], start=cut)
    manifest = {
        "name": Path(section["tokens"]).name,
        "sha256": counts.sha256,
        "rules": texts.RULES,
        "split": "two arrays" if len(paths) == 2 else f"the last {TAIL:.0%} is val",
        "train_tokens": len(arrays[0]),
        "val_tokens": len(arrays[1]),
        "vocab_size": vocab_size,
        "is_bytes": False,
        "dtype": dtype,
        "entropy": counts.entropy(),
        "bigram_loss": bigram_loss(arrays[0], arrays[1], vocab_size),
        "domains": None,
        "files": files,
    }
    if vocab_size > MAX_ORDER_1:
        manifest["entropy_note"] = f"order 1 is not counted above {MAX_ORDER_1} different tokens"
    _write_file(place, json.dumps(manifest).encode())
    return from_manifest(manifest, arrays[0], arrays[1])


_DIGESTS: dict[tuple[tuple[int, ...], ...], str] = {}
"""Digests that this process has made, by inode and times; nobody can set back the time of change
of an inode (ctime)."""


def digest_of(arrays: list[Tokens]) -> str:
    """Return the digest of the splits of a corpus: dtype, length and bytes of each."""
    hasher = hashlib.sha256()
    for tokens in arrays:
        hasher.update(f"{tokens.dtype.name}:{len(tokens)}\n".encode())
        for i in range(0, len(tokens), CHUNK):
            hasher.update(np.ascontiguousarray(tokens[i : i + CHUNK]).data)
    return hasher.hexdigest()


def _map(path: str, dtype: str) -> Tokens:
    if path.endswith(".npy"):
        array: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    return np.memmap(path, dtype=dtype, mode="r")


# --- the cache ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the user's cache folder for moenas; it need not exist, nor be writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moenas"


def kept(name: str, compute: Callable[[], float]) -> float:
    """Return a number from the user's cache, or compute it and keep it there under `name`."""
    place = cache_folder() / f"{name}.json"
    try:
        return float(json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        computed = compute()
    _write_file(place, json.dumps(computed).encode())
    return computed


def _write_file(place: Path, data: bytes) -> None:
    """Write a file of the cache at once or not at all; a cache that cannot be written is none."""
    if not place.is_absolute():  # no home, or a setting that the XDG specification calls invalid
        return
    draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(place)
    except OSError:
        with suppress(OSError):
            draft.unlink()


def _write_cache(place: Path, corpus: Corpus) -> None:
    """Keep a corpus of bytes as one file: a line of manifest, then train and val."""
    head = json.dumps(corpus.manifest).encode()
    _write_file(place, head + b"\n" + corpus.train.tobytes() + corpus.val.tobytes())


def _read_cache(place: Path) -> Corpus | None:
    """Return the corpus kept at `place`; None if there is none or its digest is wrong."""
    try:
        head, _, body = place.read_bytes().partition(b"\n")
        manifest = json.loads(head)
        tokens = np.frombuffer(body, dtype=np.uint8)
        train, val = np.split(tokens, [manifest["train_tokens"]])
        digest = hashlib.sha256()
        for split in (train, val):
            digest.update(f"uint8:{len(split)}\n".encode() + split.tobytes())
        return (
            from_manifest(manifest, train, val)
            if digest.hexdigest() == manifest["sha256"]
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
