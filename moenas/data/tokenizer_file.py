"""A tokenizer by file: `tokenizer.json` of the library tokenizers, and text encoded with it."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moenas.data.shards import Tokens
from moenas.errors import DataError
from moenas.records import Plain
from moenas.resources import sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXTRA = "pip install 'moenas[data]'"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""Added tokens that end a document; the first that a tokenizer has is used."""
BATCH = 512
"""Texts that are encoded at a time."""


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer that was read from a file."""

    path: str
    text: str = field(repr=False)
    """The file, verbatim."""
    vocab_size: int
    """The largest token plus 1, added tokens included."""
    end_of_text: str | None
    """The token after each document; None if there is none."""

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return sha256(self.text.encode())

    def encode(self, texts: Iterable[str]) -> tuple[Tokens, list[int]]:
        """Return the tokens of all texts in order, and how many each text has.

        No special tokens are added but the end of each text. Tokens are uint16, or uint32 where the
        vocabulary is larger than 65536.
        """
        tokenizer = _tokenizer(self.text)
        end = []
        if self.end_of_text is not None:
            end = [tokenizer.token_to_id(self.end_of_text)]
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        parts, lengths = [np.zeros(0, dtype=dtype)], []
        for batch in _batches(texts):
            for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                parts.append(np.array([*one.ids, *end], dtype=dtype))
                lengths.append(len(parts[-1]))
        return np.concatenate(parts), lengths

    def manifest(self) -> Plain:
        """Return the tokenizer as a JSON object, which is stored with a study; see `stored`."""
        packed = base64.b64encode(zlib.compress(self.text.encode(), 9)).decode()
        return {
            "path": self.path,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "zlib_base64": packed,
        }


def stored(manifest: Plain) -> str | None:
    """Return the text of the tokenizer.json in the manifest of a corpus; None if it has none."""
    tokenizer = manifest.get("tokenizer")
    if not tokenizer:
        return None
    return zlib.decompress(base64.b64decode(tokenizer["zlib_base64"])).decode()


def read(path: str, end_of_text: str | None = None, *, ends: bool = True) -> TokenizerFile:
    """Read a tokenizer.json.

    `end_of_text` names the token after each document; without it the first of END_OF_TEXT that
    the tokenizer has is taken, or none if `ends` is false.

    Raises:
        DataError: if the library is missing, or the file is none, or it has no such token.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        is_tokenizer = isinstance(json.loads(text), dict)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}", path="data") from None
    except ValueError:
        is_tokenizer = False
    if not is_tokenizer:
        raise DataError(f"'{path}' is no JSON; give a tokenizer.json", path="data")
    tokenizer = _tokenizer(text, path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError(f"'{path}' has an empty vocabulary; train the tokenizer", path="data")
    if end_of_text is not None and end_of_text not in vocabulary:
        raise DataError(
            f"'{path}' has no token {end_of_text!r}; name one of its tokens, or null for none",
            path="data",
        )
    if end_of_text is None and ends:
        end_of_text = next((token for token in END_OF_TEXT if token in vocabulary), None)
    return TokenizerFile(path, text, max(vocabulary.values()) + 1, end_of_text)


def _tokenizer(text: str, path: str = "tokenizer.json") -> Tokenizer:
    """Return the tokenizer, which neither cuts nor pads a text."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(f"a tokenizer needs the library tokenizers: {EXTRA}", path="data") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"'{path}' is no tokenizer.json of the library tokenizers: {reason}", path="data"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def version() -> str:
    """Return the version of the library tokenizers."""
    import tokenizers

    return str(tokenizers.__version__)


def _batches(texts: Iterable[str]) -> Iterator[list[Any]]:
    waiting = iter(texts)
    while batch := list(islice(waiting, BATCH)):
        yield batch
