"""Corpora that a process keeps from one candidate for the next."""

from __future__ import annotations

import json

from moenas import data
from moenas.data import Corpus
from moenas.records import Plain

MOST = 2
"""Corpora that are kept."""
_KEPT: dict[tuple[str, str], Corpus] = {}
"""By section and digest; the one that was used last stands last."""


def load(section: Plain, digest: str) -> Corpus:
    """Return the corpus of a section as `data.load` does; one with this digest is kept.

    Text is then neither read nor counted again. Arrays of tokens are mapped anew each time, for
    what is in a mapped file can change.

    Raises:
        DataError: as `data.load` does.
    """
    key = json.dumps(section, sort_keys=True), digest
    corpus = _KEPT.pop(key, None) or data.load(section)
    if section["kind"] != "tokens" and corpus.sha256 == digest:
        _KEPT[key] = corpus
        while len(_KEPT) > MOST:
            del _KEPT[next(iter(_KEPT))]
    return corpus
