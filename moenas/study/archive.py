"""A study as one zip file: packed, and unpacked into another database.

The members are `manifest.json` with the digest of each other member, `space.yaml`, and
`rows/TABLE.jsonl` for each table that has rows. Each file of weights or checkpoint is
`weights/SHA256.safetensors`. The same rows always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import moenas
from moenas.errors import InputError, MachineError
from moenas.records import Plain
from moenas.store import statements, study_rows, tables
from moenas.store.store import Store
from moenas.store.study_rows import StudyRows
from moenas.study.incoming import IncomingStudy, StudyFile, named_files
from moenas.study.transfer import Transferred, idle_rows

FORMAT, VERSION = "moenas-study", 1
"""What the manifest says of the file; a change of the members has another version."""
MANIFEST, SPACE = "manifest.json", "space.yaml"
LARGEST_TEXT = 1 << 30
"""Bytes of the largest member that is read into memory."""
MEMBER = re.compile(r"space\.yaml|rows/[a-z_]+\.jsonl|weights/[0-9a-f]{64}\.safetensors")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every member: the earliest that a zip file can say."""


def pack_study(store: Store, name: str, out: Path) -> Transferred:
    """Write a study with its rows, space text, corpus digest and weights to a new file.

    The file appears whole or not at all; nothing is written to the database.

    Raises:
        StudyBusyError: if a process runs the study.
        InputError: if the file exists, or a file of weights is missing or damaged.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give another name")
    rows = idle_rows(store, name)
    (study,) = rows[tables.study.name]
    texts = {SPACE: study["space_text"].encode()}
    texts |= {
        _rows_member(t): study_rows.to_lines(table_rows)
        for t, table_rows in rows.items()
        if table_rows
    }
    with _draft(out) as draft, zipfile.ZipFile(draft, "w") as archive:
        digests = {member: _write(archive, member, data) for member, data in texts.items()}
        for file in named_files(rows):
            if (member := _file_member(file)) not in digests:
                data = file.find(store, name).read_bytes()
                digests[member] = _write(archive, member, data)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "moenas": moenas.__version__,
            "study": name,
            "corpus": {key: study["data"].get(key) for key in ("name", "sha256")},
            "members": digests,
        }
        _write(archive, MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return Transferred.of(rows)


def _rows_member(table: str) -> str:
    return f"rows/{table}.jsonl"


def _file_member(file: StudyFile) -> str:
    return f"weights/{file.sha256}.safetensors"


def _write(archive: zipfile.ZipFile, member: str, data: bytes) -> Plain:
    """Add a member; return what the manifest says of it. Weights cannot be compressed."""
    info = zipfile.ZipInfo(member, EPOCH)
    stored = member.startswith("weights/")
    info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """Yield a file beside `out` that gets its name at the end of the block."""
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        os.close(handle)
        yield Path(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.link(part, out)  # unlike a rename it never replaces a file
    except FileExistsError:
        raise InputError(f"{out}: exists already; give another name") from None
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if part is not None:
            with suppress(OSError):
                os.unlink(part)


# --- unpacked ------------------------------------------------------------------------------------


def unpack_study(path: Path, store: Store, new: str | None = None) -> Transferred:
    """Put a packed study into a database; it appears whole or not at all.

    The Python files of the study are not run.

    Raises:
        InputError: if the file is no packed study, is damaged, or comes from a newer moenas.
        ConflictError: if the database has a study of this name.
    """
    with _opened(path) as archive:
        rows, members = _checked(archive)
        name = statements.normal_study_name(new or study_rows.name_of(rows))
        unpacked = study_rows.renamed(rows, name)
        with IncomingStudy(store, name) as incoming:
            for file in named_files(unpacked):
                with archive.open(_member_of(file, members)) as opened:
                    incoming.add(file, opened)  # type: ignore[arg-type]
            incoming.commit(lambda connection: study_rows.write(connection, unpacked))
    return Transferred.of(unpacked)


def check_packed(path: Path) -> None:
    """Check members, digests and rows of a packed study; weights are checked as they are stored.

    Raises:
        InputError: as `unpack_study`.
    """
    with _opened(path) as archive:
        rows, members = _checked(archive)
        for file in named_files(rows):
            _member_of(file, members)


DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)
"""What zipfile raises for a file that is damaged or packed in another way."""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a packed study; every error of its content names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGE as error:
        raise InputError(f"{path}: not a packed study, or damaged: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _ContentError as error:
        raise InputError(f"{path}: {error}") from None


class _ContentError(Exception):
    """The content of a packed study is wrong; the message does not name the file yet."""


def _manifest(archive: zipfile.ZipFile) -> dict[str, Plain]:
    """Return member -> size and digest, after a check that these are the members."""
    names = archive.namelist()
    if MANIFEST not in names:
        raise _ContentError(f"not a packed study: it has no {MANIFEST}")
    try:
        manifest = json.loads(_text(archive, MANIFEST))
        known = manifest["format"] == FORMAT
        version, members = manifest["version"], dict(manifest["members"])
        sizes = {member: (int(m["size"]), str(m["sha256"])) for member, m in members.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _ContentError(f"{MANIFEST} does not describe a packed study") from None
    if not known or not isinstance(version, int):
        raise _ContentError(f"{MANIFEST} does not describe a packed study")
    if version != VERSION:
        raise _ContentError(
            f"packed in the format {version}, this moenas knows {VERSION}; upgrade moenas"
        )
    if sorted(names) != sorted([MANIFEST, *sizes]):
        raise _ContentError(f"its members differ from {MANIFEST}; pack the study again")
    for member, (size, _) in sizes.items():
        if not MEMBER.fullmatch(member) or archive.getinfo(member).file_size != size:
            raise _ContentError(f"'{member}' is not as {MANIFEST} says; pack the study again")
    return members


def _checked(archive: zipfile.ZipFile) -> tuple[StudyRows, dict[str, Plain]]:
    """Return the rows, and member -> size and digest."""
    members = _manifest(archive)
    return _rows(archive, members), members


def _member_of(file: StudyFile, members: dict[str, Plain]) -> str:
    """Return the member that holds a file."""
    if (member := _file_member(file)) not in members:
        raise _ContentError(f"'{member}' of trial {file.trial} is missing")
    return member


def _text(archive: zipfile.ZipFile, member: str) -> bytes:
    if archive.getinfo(member).file_size > LARGEST_TEXT:
        raise _ContentError(f"'{member}' is larger than {LARGEST_TEXT:,} bytes")
    with archive.open(member) as file:
        return file.read(LARGEST_TEXT)


def _rows(archive: zipfile.ZipFile, members: dict[str, Plain]) -> StudyRows:
    """Return the rows of a packed study, after a check of digests, tables, columns and types."""
    rows: StudyRows = {}
    for member, said in members.items():
        if member.startswith("weights/"):
            if member != f"weights/{said['sha256']}.safetensors":
                raise _ContentError(f"'{member}' has another digest in {MANIFEST}")
            continue
        data = _text(archive, member)
        if hashlib.sha256(data).hexdigest() != said["sha256"]:
            raise _ContentError(f"'{member}' has another SHA-256 than {MANIFEST} says")
        if member != SPACE:
            rows[Path(member).stem] = _entries(member, data)
    try:
        study_rows.check(rows)
        if rows[tables.study.name][0]["space_text"].encode() != _text(archive, SPACE):
            raise _ContentError(f"'{SPACE}' is not the space of the rows")
    except InputError as error:
        raise _ContentError(str(error)) from None
    return rows


def _entries(member: str, data: bytes) -> list[Any]:
    try:
        entries = study_rows.from_lines(data)
        json.dumps(entries, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return entries
    except UnicodeEncodeError:
        raise _ContentError(f"'{member}' has half of a surrogate pair, which is no text") from None
    except (ValueError, RecursionError):
        raise _ContentError(f"'{member}' is not JSON, one row a line") from None
