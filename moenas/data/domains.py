"""Domains: the kind of text that each token of a corpus comes from, as runs of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonpath, dirname, relpath
from pathlib import PurePath
from typing import Any, Self

import numpy as np

from moenas.records import Plain

NAMED = 8
"""Domains with a name; the smaller ones are one."""
OTHER = "other"

Numbers = np.ndarray[Any, np.dtype[Any]]
Piece = tuple[str, int]
"""The domain of a text and its length in tokens."""


@dataclass(frozen=True, eq=False)
class Domains:
    """The domain of every token of each split."""

    names: tuple[str, ...]
    """The largest first; "other", which is all smaller ones, is the last."""
    ends: Mapping[str, Numbers]
    """Split -> where its runs end, in tokens."""
    numbers: Mapping[str, Numbers]
    """Split -> the number of the name of each run."""

    @classmethod
    def parse(cls, plain: Plain) -> Self:
        """Read what `table` wrote."""
        runs = {split: np.array(plain[split]).reshape(-1, 2) for split in ("train", "val")}
        return cls(
            tuple(plain["names"]),
            {split: split_runs[:, 1].cumsum() for split, split_runs in runs.items()},
            {split: split_runs[:, 0] for split, split_runs in runs.items()},
        )

    def at(self, split: str, places: Numbers) -> Numbers:
        """Return the numbers of the domains of the tokens at some places, in their shape."""
        run = np.searchsorted(self.ends[split], places, side="right")
        numbers: Numbers = self.numbers[split][run]
        return numbers


def table(splits: Mapping[str, Sequence[Piece]]) -> Plain | None:
    """Write down domains as a JSON object: names, and runs of [number, tokens] for each split.

    The 8 largest have names. None if all text is of one domain.
    """
    sizes = Counter[str]()
    for pieces in splits.values():
        for domain, size in pieces:
            sizes[domain] += size
    if len(sizes) < 2:
        return None
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:NAMED]
    numbers = {name: i for i, name in enumerate(names)}
    if len(sizes) > NAMED:
        names.append(OTHER)
    plain: Plain = {"names": names}
    for split, pieces in splits.items():
        numbered = [(numbers.get(domain, NAMED), size) for domain, size in pieces]
        runs = groupby(numbered, key=lambda piece: piece[0])
        plain[split] = [[number, sum(size for _, size in run)] for number, run in runs]
    return plain


def of_files(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> domain: its folder below the folder of all, its extension, or its name.

    The first of these that tells any two of the files apart.
    """
    root = commonpath([dirname(path) for path in paths])

    def folder(path: str) -> str:
        first, *rest = PurePath(relpath(path, root)).parts
        return f"{first}/" if rest else "./"

    rules: list[Callable[[str], str]] = [
        folder,
        lambda path: PurePath(path).suffix or "no extension",
        lambda path: PurePath(path).name,
    ]
    for rule in rules:
        domain_by_path = {path: rule(path) for path in paths}
        if len(set(domain_by_path.values())) > 1:
            break
    return domain_by_path


def of_library(names: Sequence[str]) -> dict[str, str]:
    """Return relative path -> domain: its package, or "modules" for all that are in none."""
    return {name: name.partition("/")[0] if "/" in name else "modules" for name in names}
