"""Corpora that a process keeps from one candidate for the next."""

from __future__ import annotations

import json

from moenas.data import loading
from moenas.data.corpus import Corpus
from moenas.data.published import fetch
from moenas.data.section import paths
from moenas.errors import DataError, InputError
from moenas.records import Plain

MOST = 2
"""Corpora that are kept."""
_KEPT: dict[str, Corpus] = {}
"""By `_key`; the one that was used last stands last."""
_FETCHED: dict[str, Corpus] = {}
"""By its digest, the corpus that was fetched last."""


def load(section: Plain, digest: str, published: Plain | None = None) -> Corpus:
    """Return the corpus of a section as `data.load` does; one with this digest is kept.

    If this machine has no files with this digest, the corpus comes from where it is `published`.

    Text is then neither read nor counted again, unless a file of it has changed. Arrays of tokens
    are mapped again each time, because a mapped file can change.

    Raises:
        DataError: as `data.load` does, or as `published.fetch` does.
    """
    if published is None:
        return _load(section, digest)
    if digest in _FETCHED:
        return _FETCHED[digest]
    wrong: Exception | None = None
    try:
        corpus = _load(section, digest)
        if corpus.sha256 == digest:
            return corpus
    except (InputError, OSError) as error:
        wrong = error
    try:
        loaded = fetch(published, digest)
    except DataError as error:
        here = f"{wrong}" if wrong else f"its files here have the digest {corpus.sha256[:12]}"
        raise DataError(f"{here}; {error}", path="data") from error
    _FETCHED.clear()
    _FETCHED[digest] = loaded
    return loaded


def _load(section: Plain, digest: str) -> Corpus:
    """Return the corpus of a section from the files of this machine."""
    key = _key(section, digest)
    corpus = _KEPT.pop(key, None) or loading.load(section)
    if section["kind"] != "tokens" and corpus.sha256 == digest:
        _KEPT[key] = corpus
        while len(_KEPT) > MOST:
            del _KEPT[next(iter(_KEPT))]
    return corpus


def _key(section: Plain, digest: str) -> str:
    """Return a text that changes with the section, the digest, or a file of the section.

    Nobody can set back the time of change of an inode (ctime).
    """
    return json.dumps([section, digest, loading.stamps(paths(section))], sort_keys=True)
