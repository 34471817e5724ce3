"""A corpus against the space that trains on it: errors and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moenas.data import loading
from moenas.data.corpus import Corpus
from moenas.data.entropy import CHUNK
from moenas.data.shards import Tokens
from moenas.data.text_columns import json_lines_keys
from moenas.errors import DataError, InputError
from moenas.evaluate import devices
from moenas.evaluate.footprint import fit
from moenas.evaluate.step_time import require_named_device

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

OUTLINED = {"flops_per_token"}
"""Objectives that need a model for its shapes alone."""
WINDOW, WINDOWS = 48, 512
"""Tokens of a piece of validation text that is looked for in training, and how many are."""
MOST = 1 << 25
"""Training tokens in which they are looked for."""
LEAK = 0.2
"""Least share of windows that occur word for word in the training text, for a warning."""
LOOKED_AT, BEGINNING = 100, 4096
"""Files of text whose first bytes are looked at, and how many bytes."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""An odd number: its powers are invertible modulo 2^64."""

Numbers = np.ndarray[Any, np.dtype[Any]]


def open_corpus(space: Space) -> Corpus:
    """Load the corpus of a space and require that the space can be trained on it.

    Raises:
        DataError: at the section `data` of the space file.
    """
    try:
        corpus = loading.load(space.data)
        corpus.require(space.train.context, min(space.vocab_sizes))
    except DataError as error:
        raise DataError(error.message, location=space.data_mark, path="data") from None
    return corpus


def notes(space: Space, corpus: Corpus) -> list[str]:
    """Return what should be known of a space file and its corpus before a study trains on it."""
    messages, recipe = space.former_names, space.train
    trains = any(objective.needs == "training" for objective in space.objectives)
    if trains and recipe.budget is None and recipe.tokens > len(corpus.train):
        messages.append(
            f"data: {recipe.tokens:,} tokens of training are drawn from"
            f" {len(corpus.train):,}: each is seen {recipe.tokens / len(corpus.train):.1f} times"
        )
    if trains and recipe.has_time_budget:
        try:
            require_named_device(recipe, devices.of_candidates(space.search.gpus))
        except InputError as error:
            messages.append(str(error))
    if trains and recipe.val_tokens > len(corpus.val):
        messages.append(
            f"data: the validation split has {len(corpus.val):,} tokens, fewer than"
            f" train.val_tokens ({recipe.val_tokens:,})"
        )
    if space.data["kind"] == "files" and not space.data.get("text_column"):
        first = space.data["files"][0]
        if keys := json_lines_keys(first):
            messages.append(
                f"data: '{first}' is JSON Lines and is read as bytes with its keys;"
                f" text_column: {keys[0]} reads a column ({', '.join(keys)})"
            )
        messages += _not_text(space.data["files"])
    share = _kept_leak(corpus) if trains else 0.0
    if share >= LEAK:
        messages.append(
            f"data: {share:.0%} of the validation text is in the training text word for word,"
            " so the loss rewards memorisation; give another validation text"
        )
    return messages


def _not_text(paths: Sequence[str]) -> list[str]:
    """Say which of some files is hardly text: the first whose beginning has a zero byte."""
    for path in paths[:LOOKED_AT]:
        with open(path, "rb") as file:
            if b"\0" in file.read(BEGINNING):
                return [
                    f"data: '{path}' has zero bytes, and is read byte by byte; an array of tokens"
                    " goes under data.tokens, and text must be UTF-8"
                ]
    return []


def room(space: Space, drawn: list[Architecture]) -> list[str]:
    """Say it if the smallest or the median of some architectures does not fit this machine."""
    needs = {objective.needs for objective in space.objectives}
    if needs == {"cost"} or {o.name for o in space.objectives if o.needs != "cost"} == OUTLINED:
        return []
    ordered = sorted(drawn, key=lambda architecture: space.cost(architecture).params)
    asked = {"smallest": ordered[0], "median": ordered[len(ordered) // 2]}
    sharers = space.search.workers or 1
    device = devices.of_candidates(space.search.gpus)
    messages = []
    for name, architecture in asked.items():
        room = fit(
            architecture,
            space.train,
            device,
            training="training" in needs,
            sharers=sharers,
        )
        if not room.fits:
            which = "" if len(ordered) == 1 else f" of the {name} candidate drawn"
            messages.append(f"memory: {room}{which}; it fails as out_of_memory")
    return messages[:1]


def _kept_leak(corpus: Corpus) -> float:
    """Return the share of `leaked`; it is computed once for each corpus, which takes seconds."""
    name = f"leak-{corpus.sha256[:32]}-{MOST}-{WINDOW}-{WINDOWS}"
    return loading.kept(name, lambda: leaked(corpus))


def leaked(corpus: Corpus) -> float:
    """Return the share of pieces of the validation text that the training text contains.

    In bytes, LF and CRLF copies of a text are one text.
    """
    train, val = corpus.train[:MOST], corpus.val
    if corpus.is_bytes:
        val = np.asarray(val)
        train, val = train[train != 13], val[val != 13]
    if len(val) < WINDOW or len(train) < WINDOW:
        return 0.0
    count = min(WINDOWS, len(val) // WINDOW)
    starts = np.linspace(0, len(val) - WINDOW, count).astype(np.int64)
    wanted = [next(_digests(val[i : i + WINDOW]))[0] for i in starts.tolist()]
    left = np.unique(np.array(wanted, dtype=np.uint64))
    seen = np.zeros(len(left), dtype=bool)
    for digests in _digests(train):
        seen |= np.isin(left, digests)
    return float(np.isin(np.array(wanted, dtype=np.uint64), left[seen]).mean())


def _digests(tokens: Tokens) -> Iterator[Numbers]:
    """Yield, part by part, a number for each WINDOW tokens: sum of token * FACTOR^place mod 2^64.

    Windows of equal tokens have equal numbers: each sum is divided by the power of its first place.
    """
    with np.errstate(over="ignore"):
        inverse = np.uint64(pow(int(FACTOR), -1, 1 << 64))
        for i in range(0, max(1, len(tokens) - WINDOW + 1), CHUNK):
            part = tokens[i : i + CHUNK + WINDOW - 1].astype(np.uint64) + np.uint64(1)
            powers = np.cumprod(np.full(len(part), FACTOR, dtype=np.uint64))
            sums = np.cumsum(part * powers, dtype=np.uint64)
            sums = np.concatenate((np.zeros(1, dtype=np.uint64), sums))
            back = np.cumprod(np.full(len(part) - WINDOW + 1, inverse, dtype=np.uint64))
            yield (sums[WINDOW:] - sums[:-WINDOW]) * back
