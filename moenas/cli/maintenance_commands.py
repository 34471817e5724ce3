"""Commands for existing studies: enqueue, run failed trials again, measure again, check, repair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moenas import terminal
from moenas.cli.options import (
    Address,
    Format,
    Log,
    NoServer,
    Output,
    Server,
    Storage,
    StudyName,
    Workers,
    command_line,
    without_password,
    worker_count,
    write_rows,
)
from moenas.cli.study_sources import open_source
from moenas.terminal import emit, say

if TYPE_CHECKING:
    from moenas.records import Evaluation


commands = typer.Typer()
"""The maintenance commands, which the command line includes."""


@commands.command()
def retry(
    study: StudyName,
    failed: Annotated[
        list[str] | None,
        typer.Option(
            "--failed",
            metavar="KIND",
            help="Kind of failure, such as error or environment; repeat the option for several. "
            "Default: all but those that end the same way again, such as diverged.",
        ),
    ] = None,
    storage: Storage = None,
    server: NoServer = None,
    workers: Workers = None,
    address: Address = None,
    log: Log = None,
    output: Format = Output.table,
) -> None:
    """Run failed trials again under their numbers, then the rest of the study."""
    from moenas.cli.watching import Watchers
    from moenas.report.front_report import front_report, front_rows
    from moenas.store.store import Store
    from moenas.study import maintenance
    from moenas.study.launch import Interrupted

    space = maintenance.stored_space(Store.open(storage).study(study))
    options = {"storage": storage, "workers": workers, "address": address}
    try:
        with Watchers(log or (), on_end=None).listeners(space, storage) as listeners:
            retried = maintenance.retry(
                study,
                kinds=failed or (),
                storage=storage,
                workers=worker_count(workers),
                address=address,
                listeners=listeners,
            )
    except Interrupted as stop:
        where = {"storage": without_password(storage) if storage else None}
        say(f"stopped: {stop}. What is not evaluated yet is evaluated by the next `moenas run`:")
        say(f"  {terminal.command(['status', study], where)}  # how far it is")
        raise typer.Exit(stop.exit_code) from None
    front = front_report(retried.store, retried.name)
    write_rows(front_rows(front, short_form=output is Output.table), output)
    say(f"next: {command_line(['status', study], {**options, 'workers': None, 'address': None})}")


@commands.command()
def enqueue(
    study: StudyName,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Space files without holes, exports, names such as zoo/olmoe_1b_7b, or study:NAME "
            "for the front of a study.",
        ),
    ],
    storage: Storage = None,
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Let a study evaluate architectures of your own next, also while it runs."""
    write_rows(open_source(storage, server).enqueue(study, files), output)


@commands.command()
def remeasure(
    study: StudyName,
    trial: Annotated[
        int | None, typer.Argument(metavar="[TRIAL]", min=0, help="One trial; default: all.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Objective to measure, also one that the study does not have. Default: those "
            "whose files have changed; of one trial, all.",
        ),
    ] = None,
    storage: Storage = None,
    server: NoServer = None,
    workers: Workers = None,
    address: Address = None,
    output: Format = Output.table,
) -> None:
    """Measure objectives of finished trials again, from their stored weights, without training."""
    from moenas.study import maintenance

    def progress(done: int, total: int, evaluation: Evaluation) -> None:
        reason = f": {evaluation.failure.message}" if evaluation.failure else ""
        say(f"[{done}/{total}] trial {evaluation.trial} {evaluation.status}{reason}")

    remeasured = maintenance.remeasure(
        study,
        trial=trial,
        objective=objective,
        storage=storage,
        workers=worker_count(workers),
        address=address,
        progress=progress,
    )
    row = {
        "study": study,
        "objectives": ", ".join(remeasured.objectives),
        "measured": len(remeasured.trials),
        "complete": remeasured.complete,
        "failed": remeasured.failed,
    }
    write_rows([row], output, single=True)


@commands.command()
def doctor(
    study: StudyName,
    repair: Annotated[
        bool, typer.Option("--repair", help="Back up the database, then repair what is possible.")
    ] = False,
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Compare a study's rows with Optuna's, the front, the weights and the files.

    Ends with 0 if all is sound, and with 1 if something is wrong and was not repaired.
    """
    from moenas.store.store import Store
    from moenas.study import doctor as examination

    store = Store.open(storage)
    examined = examination.examine(store, study)
    if repair and (backup := examination.repair(store, study, examined)) is not None:
        say(f"backup: {backup}")
        repaired = [finding for finding in examined if finding.repair]
        say(f"repaired: {len(repaired)}")
        examined = examination.examine(store, study)
    if output is Output.table and not examined:
        emit(f"study '{study}' is sound")
        return
    write_rows([finding.plain() for finding in examined], output)
    if examined:
        if any(finding.repair for finding in examined):
            where = {"storage": without_password(storage) if storage else None}
            say(f"next: {terminal.command(['doctor', study, '--repair'], where)}")
        raise typer.Exit(1)
