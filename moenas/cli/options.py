"""Options that several commands share, and how commands write rows."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

from moenas import terminal
from moenas.errors import InputError
from moenas.passwords import shown_address
from moenas.terminal import columns, emit, to_json


class Output(StrEnum):
    """How data is written to stdout."""

    table = "table"
    json = "json"
    csv = "csv"


Storage = Annotated[
    str | None,
    typer.Option(
        help="Database URL as Optuna takes it. Default: $MOENAS_STORAGE, $OPTUNA_STORAGE, then "
        "sqlite:///moenas.db",
        metavar="URL",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        help="URL of a server, in place of a database. Default: $MOENAS_SERVER; its token is "
        "$MOENAS_TOKEN",
        metavar="URL",
    ),
]


def _refuse_server(context: typer.Context, server: str | None) -> None:
    """Refuse a server for a command that needs the database itself."""
    # Options of the command line are read before those that are left out.
    by_variable = context.params.get("storage") is None and os.environ.get("MOENAS_SERVER")
    if server is None and not by_variable:
        return
    url = server or by_variable
    verb = str(context.info_name)
    url = shown_address(str(url))
    hint = f"; the server has its dashboard at {url}/dashboard" if verb == "dashboard" else ""
    raise InputError(
        f"{verb} needs a database, not the server {url}: give --storage URL of the database, or run"
        f" it on the machine of the server without MOENAS_SERVER{hint}"
    )


NoServer = Annotated[str | None, typer.Option("--server", hidden=True, callback=_refuse_server)]
"""The option of a command that has no form for a server: it says what to do."""
_wanted: set[Output] = set()
"""The form of the data that the command line asks for."""


def _note_format(output: Output) -> Output:
    _wanted.clear()
    _wanted.add(output)
    return output


def is_json_wanted() -> bool:
    """Whether this command line asks for data as JSON."""
    return Output.json in _wanted


Format = Annotated[
    Output,
    typer.Option(
        "-o", "--output", callback=_note_format, is_eager=True, help="Format of the data on stdout."
    ),
]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")]
TrialNumber = Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="Number of the trial.")]


Workers = Annotated[
    str | None,
    typer.Option(help="Number of parallel candidates on Ray, or 'inline' to run without Ray."),
]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: a new local cluster.")
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Accept changed files of objectives; finished trials are measured again. Later"
        " candidates are refused by the newest calibration.",
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Reuse no evaluation of another study in the database.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Estimate tokens, FLOPs and hours; nothing is written.")
]
Trials = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1_000_000,
        help="Candidates that the study evaluates in total; resumes up to it.",
    ),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="TOOL[:WHERE]",
        help="Log each trial: tensorboard[:DIR], mlflow[:URI] or wandb[:PROJECT]; repeatable.",
    ),
]
OnEnd = Annotated[
    str | None,
    typer.Option(
        "--on-end",
        metavar="CMD",
        help="Run this shell command once when the run ends, also when it is interrupted. It gets "
        "MOENAS_STUDY, MOENAS_STATE (finished, interrupted or failed) and counts.",
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run the study's Python files that the database stores."),
]


def worker_count(text: str | None) -> int | Literal["inline"] | None:
    """Read --workers: a number, 'inline' or nothing."""
    if text is None:
        return None
    if text == "inline":
        return "inline"
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise InputError(f"--workers {text}: give a number of at least 1, or 'inline'")
    return int(text)


def operator() -> str:
    """Return what the audit calls the user of this machine."""
    return f"local uid {os.getuid()}"


def command_line(words: Sequence[str], options: Mapping[str, object]) -> str:
    """Return a command to type, without the passwords of its addresses."""
    given = dict(options)
    for name in ("storage", "server"):
        if given.get(name) is not None:
            given[name] = without_password(str(given[name]))
    if isinstance(logs := given.get("log"), list):
        given["log"] = [shown_address(text) for text in logs]
    return terminal.command(words, given)


def without_password(url: str) -> str:
    """Hide the secrets of a database URL; $MOENAS_STORAGE can hold it."""
    from moenas.store.urls import shown

    return shown(url)


def write_rows(rows: list[dict[str, Any]], output: Output, *, single: bool = False) -> None:
    """Write rows to stdout as a table, JSON or CSV."""
    if output is Output.json:
        emit(to_json(rows[0] if single else rows))
    elif output is Output.csv:
        write_csv(rows)
    else:
        from moenas.report.summary import table

        emit(table(rows, columns()))


def write_csv(rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; nested values are JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow(to_json(c, None) if isinstance(c, dict | list) else c for c in cells)
    emit(text.getvalue().removesuffix("\n"))
