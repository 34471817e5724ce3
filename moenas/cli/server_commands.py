"""Commands for studies in the queue of a server: pause, resume, cancel, extend."""

from __future__ import annotations

from typing import Annotated

import typer

from moenas.cli.options import Format, Output, Server, StudyName, write_rows
from moenas.cli.study_sources import require_server
from moenas.records import Plain
from moenas.terminal import say

commands = typer.Typer()
"""The commands for the queue of a server, which the command line includes."""


def _write(detail: Plain, output: Output) -> None:
    """Write the state of a study that was changed."""
    row = {"study": detail["name"], "state": detail["state"], "trials": detail["trials"]}
    write_rows([row], output, single=True)
    if detail["driver_running"] and detail["state"] in ("paused", "cancelled"):
        say("its driver finishes its current write and ends")


@commands.command()
def pause(study: StudyName, server: Server = None, output: Format = Output.table) -> None:
    """Stop a study of a server until it is resumed; nothing is lost."""
    _write(require_server("pause", server).study(study).pause(), output)


@commands.command()
def resume(study: StudyName, server: Server = None, output: Format = Output.table) -> None:
    """Put a paused, failed or cancelled study of a server back into its queue."""
    _write(require_server("resume", server).study(study).resume(), output)


@commands.command()
def cancel(study: StudyName, server: Server = None, output: Format = Output.table) -> None:
    """End a study of a server; its trials stay."""
    _write(require_server("cancel", server).study(study).cancel(), output)


@commands.command()
def extend(
    study: StudyName,
    trials: Annotated[
        int,
        typer.Argument(
            metavar="TRIALS", min=1, max=1_000_000, help="Candidates that it evaluates in total."
        ),
    ],
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Raise how many candidates a study of a server evaluates; a finished one is queued again."""
    _write(require_server("extend", server).study(study).extend(trials), output)
