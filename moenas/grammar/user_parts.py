"""Components of the user: files named under `use`, loaded wherever a candidate is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moenas import resources
from moenas.errors import InputError
from moenas.grammar.component import Component
from moenas.records import Plain


@dataclass(frozen=True)
class UserFile:
    """One file of parts and its text, so that it can be loaded where the file is not."""

    path: str
    source: str
    kinds: tuple[str, ...]
    """Words that a space file can now use."""

    def plain(self) -> Plain:
        """Return what a study stores of the file."""
        sha256 = resources.sha256(self.source.encode())
        return {"path": self.path, "sha256": sha256, "source": self.source}


def load(path: str, source: str | None = None) -> UserFile:
    """Load a file of parts, or the given text of one, and let its kinds be found by their names.

    Raises:
        InputError: naming file and line, if it cannot be read, does not run or defines no part.
    """
    text = resources.read_text(Path(path)) if source is None else source
    module = resources.load_module(Path(path), text)
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
    return UserFile(path, text, tuple(kinds))


def load_all(sources: Mapping[str, str]) -> None:
    """Load the files of a job: path -> text."""
    for path, source in sources.items():
        load(path, source)


def load_stored(space: Plain, *, allow_code: bool) -> None:
    """Load the files of parts that a stored space uses, if the user allows it.

    A database is not code: another user may have written its content. A file that lies at its path
    with the stored digest, where nobody else can have put it, counts as allowed.

    Raises:
        InputError: if a text is not the one that its digest names, or is not allowed.
    """
    files = space.get("use", [])
    for file in files:
        path, source, digest = (str(file[key]) for key in ("path", "source", "sha256"))
        if resources.sha256(source.encode()) != digest:
            raise InputError(
                f"{path}: the database holds another text than the one with SHA-256"
                f" {digest[:12]}... that the study used; it is not run"
            )
        if not allow_code and not _is_own(Path(path), digest):
            raise InputError(
                f"{path}: the model needs this file, which is stored in the database and is not"
                f" here with SHA-256 {digest[:12]}...; if you trust who wrote the database, allow"
                " it to be run: --allow-code, or allow_code=True"
            )
    load_all({str(file["path"]): str(file["source"]) for file in files})


def _is_own(path: Path, digest: str) -> bool:
    """Whether the user has the same file at the same place."""
    try:
        return resources.sha256(path.read_bytes()) == digest and resources.foreign(path) is None
    except (OSError, ValueError):
        return False
