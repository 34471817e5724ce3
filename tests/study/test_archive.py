"""Studies as zip files: packed, unpacked, and every file that is refused."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from studies import assert_sound, space
from test_transfer import files_of, rows_of

from moenas.errors import ConflictError, InputError, MoenasError, StudyBusyError
from moenas.store import study_rows
from moenas.store.heartbeat import StudyLease
from moenas.store.store import Store
from moenas.study.archive import check_packed, pack_study, unpack_study
from moenas.study.incoming import named_files
from moenas.study.launch import run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

FILE = Path("s.zip")


@pytest.fixture
def source(jobs: list[Any]) -> Store:
    """A finished study, packed into FILE."""
    store = run(space(), trials=4, workers="inline", storage="sqlite:///source.db").store
    pack_study(store, "s", FILE)
    return store


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(FILE) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def write(files: dict[str, bytes]) -> None:
    """Write members as they are."""
    with zipfile.ZipFile(FILE, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_signed(files: dict[str, bytes], **manifest: Any) -> None:
    """Write members with a manifest that fits them."""
    said = json.loads(files.pop("manifest.json")) | manifest
    said["members"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    write(files | {"manifest.json": json.dumps(said).encode()})


def test_a_packed_study_comes_back_bit_for_bit(source: Store, database_url: str) -> None:
    target = Store.open(database_url, create=True)
    unpack_study(FILE, target)
    assert rows_of(target, "s") == rows_of(source, "s")
    assert files_of(target, "s") == files_of(source, "s") != {}
    pack_study(target, "s", Path("again.zip"))
    assert Path("again.zip").read_bytes() == FILE.read_bytes()
    unpack_study(FILE, target, "t")
    assert rows_of(target, "t") == study_rows.renamed(rows_of(source, "s"), "t")
    study = run(space(name="t"), trials=6, workers="inline", storage=database_url)
    assert_sound(study, 6)


def test_the_members_are_readable_without_moenas(source: Store) -> None:
    files = members()
    manifest = json.loads(files.pop("manifest.json"))
    assert (manifest["format"], manifest["version"], manifest["study"]) == ("moenas-study", 1, "s")
    assert manifest["corpus"]["sha256"] == source.study("s").data["sha256"]
    for name, data in files.items():
        assert manifest["members"].pop(name)["sha256"] == hashlib.sha256(data).hexdigest()
    assert not manifest["members"]
    assert yaml.safe_load(files["space.yaml"])["name"] == "s"
    weights = {name: data for name, data in files.items() if name.startswith("weights/")}
    assert set(weights.values()) == set(files_of(source, "s").values())
    rows = files["rows/moenas_evaluation.jsonl"].decode().splitlines()
    assert len(rows) == source.count("s")


def test_what_exists_and_what_runs_is_refused(source: Store, database_url: str) -> None:
    target = Store.open(database_url, create=True)
    unpack_study(FILE, target)
    with pytest.raises(ConflictError, match="already exists"):
        unpack_study(FILE, target)
    before = FILE.read_bytes()
    with pytest.raises(InputError, match=r"s\.zip: exists already"):
        pack_study(source, "s", FILE)
    with StudyLease(source, "s"), pytest.raises(StudyBusyError, match="being run by pid"):
        pack_study(source, "s", Path("busy.zip"))
    with pytest.raises(MoenasError, match="cannot be written"):
        pack_study(source, "s", Path("nowhere/s.zip"))
    named_files(rows_of(source, "s"))[0].path(source.runs, "s").unlink()
    with pytest.raises(InputError, match="are not there"):
        pack_study(source, "s", Path("half.zip"))
    assert FILE.read_bytes() == before
    assert not Path("busy.zip").exists()
    assert not Path("half.zip").exists()
    assert not list(Path().glob(".*.zip.*"))


def _edited(table: str, change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """Return what changes the first row of a table, with digests that fit."""

    def edit() -> None:
        files, name = members(), f"rows/{table}.jsonl"
        first, *rest = files[name].decode().splitlines()
        row = json.loads(first)
        change(row)
        files[name] = "\n".join([json.dumps(row), *rest]).encode()
        write_signed(files)

    return edit


def _without_weights() -> None:
    rows = members()
    write_signed({n: data for n, data in rows.items() if not n.startswith("weights/")})


def _with_other_weights() -> None:
    rows = members()
    name = next(n for n in rows if n.startswith("weights/"))
    write(rows | {name: bytes(len(rows[name]))})


def _flip_a_byte() -> None:
    data = bytearray(FILE.read_bytes())
    at = data.index(b"weights of")
    data[at] ^= 1
    FILE.write_bytes(data)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no zip": (lambda: FILE.write_bytes(b"hello"), "not a packed study, or damaged"),
    "cut off": (lambda: FILE.write_bytes(FILE.read_bytes()[:-100]), "or damaged"),
    "a flipped byte": (_flip_a_byte, "or damaged"),
    "another zip": (lambda: write({"a": b""}), "it has no manifest.json"),
    "no JSON": (lambda: write({"manifest.json": b"["}), "does not describe a packed study"),
    "another manifest": (
        lambda: write({"manifest.json": b"{}"}),
        "does not describe a packed study",
    ),
    "a newer format": (lambda: write_signed(members(), version=2), "upgrade moenas"),
    "one member more": (
        lambda: write(members() | {"../x": b""}),
        "members differ from manifest.json",
    ),
    "a path": (lambda: write_signed(members() | {"../x": b""}), "is not as manifest.json says"),
    "changed rows": (
        lambda: write(members() | {"space.yaml": bytes(len(members()["space.yaml"]))}),
        "another SHA-256",
    ),
    "another space": (lambda: write_signed(members() | {"space.yaml": b"a"}), "not the space of"),
    "other weights": (_with_other_weights, "SHA-256"),
    "no weights": (_without_weights, "is missing"),
    "an unknown table": (
        lambda: write_signed(members() | {"rows/moenas_token.jsonl": b""}),
        "table 'moenas_token': not one",
    ),
    "no row of JSON": (
        lambda: write_signed(members() | {"rows/moenas_run.jsonl": b"{"}),
        "not JSON",
    ),
    "NaN": (
        lambda: write_signed(members() | {"rows/moenas_run.jsonl": b'{"seconds": NaN}'}),
        "not JSON",
    ),
    "an unknown column": (_edited("moenas_value", lambda r: r.update(x=1)), "its columns are not"),
    "a text as a number": (
        _edited("moenas_evaluation", lambda r: r.update(attempt="1; DROP TABLE x")),
        "'attempt' is no Integer",
    ),
    "a null": (_edited("moenas_attempt", lambda r: r.update(started_at=None)), "is null"),
    "an unknown state": (_edited("trials", lambda r: r.update(state="LOST")), "'state' is no Enum"),
    "a row of another study": (
        _edited("moenas_evaluation", lambda r: r.update(study="other")),
        "a row of another study",
    ),
    "a row of another trial": (
        _edited("trial_params", lambda r: r.update(trial_id=77)),
        "without its trial_id",
    ),
    "a row without its trial": (
        _edited("moenas_evaluation", lambda r: r.update(trial=77)),
        "rows cannot be stored",
    ),
    "half a surrogate pair": (
        _edited("moenas_study", lambda r: r.update(space_text="name: \ud800")),
        "half of a surrogate pair",
    ),
    "a space that is none": (_edited("moenas_study", lambda r: r.update(space=5)), "is no JSON"),
    "a space that is a list": (
        _edited("moenas_study", lambda r: r.update(space=[])),
        "'space' is no object",
    ),
    "a section that is a list": (
        _edited("moenas_study", lambda r: r["space"].update(search=[])),
        r"'space\.search' is no object",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_and_leaves_nothing(source: Store, case: str) -> None:
    edit, message = WRONG[case]
    edit()
    target = Store.open("sqlite:///target.db", create=True)
    with pytest.raises(InputError, match=message):
        unpack_study(FILE, target)
    assert target.studies() == []
    assert not target.holds_optuna_study("s")
    assert not list(target.runs.glob("*"))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"^nowhere\.zip: no such file$"):
        check_packed(Path("nowhere.zip"))
