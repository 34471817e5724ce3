"""Streams of tokens: corpora that every Python has, the user's text files, and token arrays."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from moenas.data import text as texts
from moenas.data import token_files, tokenizer_file
from moenas.data.bigram import bigram_loss
from moenas.data.corpus import Corpus
from moenas.data.domains import Domains, table
from moenas.data.entropy import CHUNK, MAX_ORDER_1, Counts
from moenas.data.section import paths
from moenas.data.shards import Shard, TokenArray, Tokens, divided, joined
from moenas.data.text import Text
from moenas.data.tokenizer_file import TokenizerFile
from moenas.errors import DataError
from moenas.records import Plain
from moenas.resources import sha256

TAIL = 0.05
"""Share of one array of tokens, at its end, that validates."""


# --- loading -----------------------------------------------------------------------------------


def load(section: Plain) -> Corpus:
    """Return the corpus that a section, as `parse` gives it, describes.

    Raises:
        DataError: if a file has become unreadable, or a token is outside the vocabulary.
    """
    kind = section["kind"]
    if kind == "tokens":
        return _load_tokens(section)
    if section.get("tokenizer"):
        return _load_encoded(section)
    return _load_stdlib() if kind == "stdlib" else _text_corpus(_text(section))


def _text(section: Plain, *, is_utf8: bool = False) -> Text:
    """Read the text of a section."""
    if section["kind"] == "stdlib":
        return texts.stdlib(texts.stdlib_sources())
    if section["kind"] == "pydoc":
        return texts.pydoc()
    files, val = section["files"], section.get("val")
    if section.get("text_column"):
        return texts.columns(files, section["text_column"], val)
    return texts.files(files, val, is_utf8=is_utf8)


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
    lengths = {"train": [len(x) for x in text.train], "val": [len(x) for x in text.val]}
    return _counted(text, train, val, lengths)


def _counted(
    text: Text,
    train: Tokens,
    val: Tokens,
    lengths: Mapping[str, list[int]],
    tokenizer: TokenizerFile | None = None,
) -> Corpus:
    """Count the tokens of text; `lengths` are the lengths of its parts in tokens."""
    vocab_size, more = 256, dict(text.details)
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
        more |= {"dtype": train.dtype.name, "tokenizer": tokenizer.manifest()}
        more |= _entropy_note(vocab_size)
    counts = Counts(vocab_size)
    for split in (train, val):
        counts.add(split)
    manifest = {
        "name": text.name,
        "sha256": counts.sha256,
        "rules": texts.RULES,
        "split": text.rule,
        "train_tokens": len(train),
        "val_tokens": len(val),
        "vocab_size": vocab_size,
        "is_bytes": tokenizer is None,
        "entropy": counts.entropy(),
        "bigram_loss": bigram_loss(train, val, vocab_size),
        **more,
        "domains": table(
            {
                split: list(zip(text.domains[split], lengths[split], strict=True))
                for split in ("train", "val")
            }
        ),
        "files": text.files,
    }
    return from_manifest(manifest, train, val)


def _load_encoded(section: Plain) -> Corpus:
    """Return text as the tokens of its tokenizer; from the cache if the files are as they were.

    Raises:
        DataError: if a text is not UTF-8, or the tokenizer is another one than was checked.
    """
    end = section["end_of_text"]
    tokenizer = tokenizer_file.read(section["tokenizer"], end, ends=False)
    if tokenizer.vocab_size != section["vocab_size"]:
        raise DataError(
            f"'{tokenizer.path}' has {tokenizer.vocab_size} tokens, and had"
            f" {section['vocab_size']} when the space was checked",
            path="data",
        )
    version = platform.python_version(), tokenizer_file.version()
    state = [texts.RULES, version, section, tokenizer.sha256, stamps(paths(section))]
    key = sha256(json.dumps(state, sort_keys=True).encode())
    place = cache_folder() / f"encoded-{key[:32]}"
    corpus = _read_cache(place)
    if corpus is None:
        corpus = _encoded(_text(section, is_utf8=True), tokenizer)
        _write_cache(place, corpus)
    return corpus


def _encoded(text: Text, tokenizer: TokenizerFile) -> Corpus:
    """Assemble a corpus of the tokens of text."""
    (train, train_lengths), (val, val_lengths) = (
        tokenizer.encode(part.decode() for part in parts) for parts in (text.train, text.val)
    )
    return _counted(text, train, val, {"train": train_lengths, "val": val_lengths}, tokenizer)


def from_manifest(manifest: Plain, train: TokenArray, val: TokenArray) -> Corpus:
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

    They are read whole, so that the digest describes their present content. Counts are kept under
    this digest.
    """
    vocab_size = section["vocab_size"]
    listed = [_listed(section.get(key)) for key in ("tokens", "val")]
    paths = [path for split in listed for path in split]
    try:
        splits = [[_map(path, section["dtype"]) for path in split] for split in listed]
        files = [{"path": p, "bytes": os.path.getsize(p)} for p in paths]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{error}; it was readable when the space was checked", path="data"
        ) from None
    train, cut = joined(splits[0]), 0
    if splits[1]:
        val = joined(splits[1])
    else:
        cut = len(train) - int(len(train) * TAIL)
        train, val = divided(train, cut)
    tokenizer = tokenizer_file.read(section["tokenizer"]) if section.get("tokenizer") else None
    digest = _known_digest(paths, [train, val])
    told = {} if tokenizer is None else {"tokenizer": tokenizer.manifest()}
    key = json.dumps([texts.RULES, section, files, digest, *told], sort_keys=True)
    place = cache_folder() / f"tokens-{sha256(key.encode())[:32]}.json"
    try:
        return from_manifest({**json.loads(place.read_text()), **told}, train, val)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    counts = Counts(vocab_size)
    counts.add(train, paths[0])
    counts.add(val, paths[-1], start=cut)
    given = "two arrays" if len(paths) == 2 else "two lists of arrays"
    manifest = {
        "name": _name_of(listed[0]),
        "sha256": counts.sha256,
        "rules": texts.RULES,
        "split": given if splits[1] else f"the last {TAIL:.0%} is val",
        "train_tokens": len(train),
        "val_tokens": len(val),
        "vocab_size": vocab_size,
        "is_bytes": False,
        "dtype": section["dtype"],
        "entropy": counts.entropy(),
        "bigram_loss": bigram_loss(train, val, vocab_size),
        "domains": None,
        "files": files,
        **_entropy_note(vocab_size),
    }
    _write_file(place, json.dumps(manifest).encode())
    return from_manifest({**manifest, **told}, train, val)


def _entropy_note(vocab_size: int) -> Plain:
    """Say why the entropy of a token given the one before it is missing, where it is."""
    if vocab_size <= MAX_ORDER_1:
        return {}
    return {"entropy_note": f"order 1 is not counted above {MAX_ORDER_1} different tokens"}


def _listed(value: str | list[str] | None) -> list[str]:
    """Return the paths of a field, which holds one, several or none."""
    return [value] if isinstance(value, str) else value or []


def _name_of(paths: list[str]) -> str:
    """Return the name of an array, or of the folder of the first of several."""
    return Path(paths[0]).name if len(paths) == 1 else Path(paths[0]).parent.name


def _map(path: str, dtype: str) -> Shard:
    """Map one file of tokens.

    Raises:
        ValueError: if it is of another type than when the space was checked.
    """
    token_file = token_files.inspect(path, dtype)
    if token_file.dtype != dtype:
        raise ValueError(f"'{path}' holds {token_file.dtype}, not {dtype}")
    return token_file.map()


_DIGESTS: dict[str, str] = {}
"""Digests that this process has made, by lengths, inodes and times of files; nobody can set back
the time of change of an inode (ctime)."""


def _known_digest(paths: list[str], splits: list[TokenArray]) -> str:
    """Return the digest of two splits, which is computed once in a process for each state."""
    key = json.dumps([[len(split) for split in splits], stamps(paths)])
    if key not in _DIGESTS:
        _DIGESTS[key] = digest_of(splits)
    return _DIGESTS[key]


def stamps(paths: list[str]) -> list[list[object]]:
    """Return what changes of each file with its content: place, size and times."""
    stamped: list[list[object]] = []
    for path in paths:
        with suppress(OSError):
            stat = os.stat(path)
            inode = stat.st_dev, stat.st_ino, stat.st_size
            stamped.append([path, *inode, stat.st_mtime_ns, stat.st_ctime_ns])
    return stamped


def digest_of(splits: Sequence[TokenArray]) -> str:
    """Return the digest of the splits of a corpus: dtype, length and bytes of each."""
    hasher = hashlib.sha256()
    for tokens in splits:
        hasher.update(f"{tokens.dtype.name}:{len(tokens)}\n".encode())
        for i in range(0, len(tokens), CHUNK):
            hasher.update(np.ascontiguousarray(tokens[i : i + CHUNK]).data)
    return hasher.hexdigest()


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
    """Keep a corpus as one file: a line of manifest, then train and val."""
    head = json.dumps(corpus.manifest).encode()
    body = b"".join(np.asarray(split).tobytes() for split in (corpus.train, corpus.val))
    _write_file(place, head + b"\n" + body)


def _read_cache(place: Path) -> Corpus | None:
    """Return the corpus kept at `place`; None if there is none or its digest is wrong.

    Tokens of a tokenizer are mapped into memory, bytes are read.
    """
    try:
        with place.open("rb") as file:
            head = file.readline()
            manifest = json.loads(head)
            is_bytes = manifest["is_bytes"]
            body = file.read() if is_bytes else b""
        tokens: Tokens = np.frombuffer(body, dtype=np.uint8)
        if not is_bytes:
            tokens = np.memmap(place, dtype=manifest["dtype"], mode="r", offset=len(head))
        train, val = np.split(tokens, [manifest["train_tokens"]])
        digest = _known_digest([str(place)], [train, val])
        return from_manifest(manifest, train, val) if digest == manifest["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
