"""Parts that are a guest's: files named under `use`, loaded wherever a candidate is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moenas import refs
from moenas.component import Component
from moenas.errors import InputError
from moenas.records import Plain


@dataclass(frozen=True)
class Guest:
    """One file of parts and what it says, so that it can be loaded where the file is not."""

    path: str
    source: str
    kinds: tuple[str, ...]
    """Words that a space file can now use."""

    def plain(self) -> Plain:
        """Return what a study stores of the file."""
        sha256 = refs.sha256(self.source.encode())
        return {"path": self.path, "sha256": sha256, "source": self.source}


def load(path: str, source: str | None = None) -> Guest:
    """Load a file of parts, or the given text of one, and let its kinds be found by their names.

    Raises:
        InputError: naming file and line, if it cannot be read, does not run or defines no part.
    """
    text = refs.read_text(Path(path)) if source is None else source
    module = refs.load_module(Path(path), text)
    kinds = []
    for cls in vars(module).values():
        own = isinstance(cls, type) and issubclass(cls, Component)
        if own and cls.__module__ == module.__name__ and cls.kind is not None:
            cls.kinds[cls.kind] = cls  # a later version of the file may have taken the name
            kinds.append(cls.kind)
    if not kinds:
        raise InputError(
            f'{path}: defines no part; write e.g. class Mine(Mixer, kind="mine"), see docs/parts.md'
        )
    return Guest(path, text, tuple(kinds))


def load_all(sources: Mapping[str, str]) -> None:
    """Load the files of a job or of a stored study: path -> text."""
    for path, source in sources.items():
        load(path, source)


def stored(space: Plain) -> dict[str, str]:
    """Return path -> text of the files that a stored space uses."""
    return {str(guest["path"]): str(guest["source"]) for guest in space.get("use", [])}
