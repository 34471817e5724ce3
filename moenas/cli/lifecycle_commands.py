"""Commands for whole studies: list, rename, delete, copy, pack, unpack, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moenas import terminal
from moenas.cli.options import (
    Format,
    NoServer,
    Output,
    Server,
    Storage,
    StudyName,
    operator,
    without_password,
    write_csv,
    write_rows,
)
from moenas.cli.study_sources import open_server, open_source, server_url
from moenas.errors import InputError
from moenas.terminal import emit, say, to_json

if TYPE_CHECKING:
    from moenas.store.store import Store

commands = typer.Typer()
"""The commands for whole studies, which the command line includes."""

NewName = Annotated[
    str | None,
    typer.Option("--name", metavar="NEW", help="Name of the new study. Default: the same name."),
]


def _open_to_change(storage: str | None) -> Store:
    """Open a database that is there, and bring it to the newest schema."""
    from moenas.store.store import Store

    Store.open(storage).engine.dispose()  # makes nothing where there is none
    return Store.open(storage, create=True)


@commands.command("list")
def list_studies(
    storage: Storage = None, server: Server = None, output: Format = Output.table
) -> None:
    """List the studies: state, trials, front, hypervolume and last activity."""
    listed = open_source(storage, server).studies()
    rows = [{key: value for key, value in row.items() if key != "created"} for row in listed]
    if output is not Output.json:
        rows = [{**row, "objectives": ", ".join(row["objectives"])} for row in rows]
    if output is Output.table:
        rows = [{**row, "last_activity": row["last_activity"][:19]} for row in rows]
    write_rows(rows, output)


@commands.command()
def rename(
    study: StudyName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new name.")],
    storage: Storage = None,
    server: NoServer = None,
) -> None:
    """Give a study another name; its weights and Optuna's rows follow."""
    from moenas.study.transfer import rename_study

    rename_study(_open_to_change(storage), study, new, operator())
    say(f"renamed: '{study}' is '{new}'; a run of its space file needs this name:")
    where = {"storage": without_password(storage) if storage else None}
    say(f"  {terminal.command(['run', 'SPACE', f'name={new}'], where)}")


@commands.command()
def delete(
    study: StudyName,
    storage: Storage = None,
    server: Server = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a study with its trials, weights, checkpoints and Optuna's rows."""
    from moenas.store import submissions
    from moenas.study.deletion import delete_study

    if (url := server_url(storage, server)) is not None:
        remote = open_server(url).study(study)
        if not yes:
            _confirm_deletion(study, remote.detail()["evaluations"])
        say(f"deleted: '{study}' with {remote.delete()} finished trials")
        return
    store = _open_to_change(storage)
    if store.query(lambda connection: submissions.find(connection, study)) is None:
        store.study(study)  # raises NotFoundError with a suggestion
    if not yes:
        _confirm_deletion(study, store.count(study) if store.knows(study) else 0)
    trials = delete_study(store, study, operator())
    say(f"deleted: '{study}' with {trials} finished trials")


def _confirm_deletion(study: str, trials: int) -> None:
    """Ask whether a study is to be deleted.

    Raises:
        InputError: if no terminal can answer.
        typer.Exit: if the answer is no.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError(f"study '{study}': --yes deletes it without a question")
    question = f"Delete study '{study}' with {trials} finished trials and all of their weights?"
    if not typer.confirm(question, err=True):
        say("nothing is deleted")
        raise typer.Exit(1)


@commands.command()
def copy(
    study: StudyName,
    to: Annotated[
        str, typer.Option("--to", metavar="URL", help="Database URL that the copy goes to.")
    ],
    name: NewName = None,
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Copy a study with its weights to another database, or under another name."""
    from moenas.store.store import Store
    from moenas.study.transfer import copy_study, idle_rows

    source = Store.open(storage)
    idle_rows(source, study)  # nothing is made if the study cannot be copied
    copied = copy_study(source, study, Store.open(to, create=True), name)
    write_rows([{**copied.plain(), "storage": without_password(to)}], output, single=True)


@commands.command()
def pack(
    study: StudyName,
    out: Annotated[Path, typer.Argument(metavar="FILE.zip", help="The file to write.")],
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Write a study with its rows, space file, corpus digest and weights to one zip file."""
    from moenas.store.store import Store
    from moenas.study.archive import pack_study

    packed = pack_study(Store.open(storage), study, out)
    write_rows([{**packed.plain(), "file": str(out)}], output, single=True)


@commands.command()
def unpack(
    path: Annotated[Path, typer.Argument(metavar="FILE.zip", help="A packed study.")],
    name: NewName = None,
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Put a packed study into a database; its Python files are not run."""
    from moenas.store.store import Store
    from moenas.study.archive import check_packed, unpack_study

    check_packed(path)  # nothing is made if the file is wrong
    unpacked = unpack_study(path, Store.open(storage, create=True), name)
    write_rows([unpacked.plain()], output, single=True)


@commands.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Name of a study.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Name of another study.")],
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Compare two fronts: hypervolumes, coverage, and which members dominate which."""
    from moenas.report.comparison import comparison_report, comparison_text
    from moenas.store.store import Store

    store = Store.open(storage)
    comparison = comparison_report(store.front_view(a), store.front_view(b))
    if output is Output.csv:
        write_csv(comparison["members"])
    else:
        emit(to_json(comparison) if output is Output.json else comparison_text(comparison))
