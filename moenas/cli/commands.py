"""The command line: one verb a command, no logic; stdout is data, stderr has messages."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import moenas
from moenas import terminal
from moenas.cli import (
    calibration_commands,
    lifecycle_commands,
    maintenance_commands,
    server_commands,
    service_commands,
)
from moenas.cli.options import (
    AcceptChanges,
    Address,
    AllowCode,
    DryRun,
    Format,
    Fresh,
    Log,
    NoServer,
    OnEnd,
    Output,
    Server,
    Storage,
    StudyName,
    TrialNumber,
    Trials,
    Workers,
    command_line,
    is_json_wanted,
    without_password,
    worker_count,
    write_csv,
    write_rows,
)
from moenas.cli.results import say_next_steps, write_estimate, write_front
from moenas.cli.study_sources import connections, open_server, open_source, server_url
from moenas.errors import (
    EnvironmentFaultError,
    InputError,
    MoenasError,
    StorageLostError,
    StudyStoppedError,
)
from moenas.passwords import hide_in
from moenas.terminal import command, emit, say, to_json

if TYPE_CHECKING:
    from moenas.cli.watching import Watchers
    from moenas.records import Plain
    from moenas.space.space import Space
    from moenas.study.launch import Study

app = typer.Typer(
    name="moenas",
    help="Describe a family of mixture-of-experts language models; get back its Pareto front.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; every known error is one line on stderr and its own exit code."""
    terminal.prepare()
    try:
        try:
            app()
        finally:
            connections.close()
            terminal.flush()
    except MoenasError as error:
        _write_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    except SystemExit as end:
        # Typer turns a KeyboardInterrupt into an exit without a word.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            say("stopped")
        raise
    except Exception as error:
        if os.environ.get("MOENAS_DEBUG"):
            say(traceback.format_exc())
            sys.exit(1)
        said = " ".join(str(error).split())[:300]
        say(f"moenas: internal error: {type(error).__name__}: {said}")
        say("this is a bug in moenas; MOENAS_DEBUG=1 prints the traceback")
        sys.exit(1)


def _write_error(error: MoenasError) -> None:
    """Write an error to stderr; with `-o json`, also its fields to stdout as a JSON object."""
    say(f"moenas: {error}")
    if is_json_wanted():
        # The error decides the exit code, whether or not stdout can be written.
        with contextlib.suppress(MoenasError, SystemExit):
            emit(to_json(hide_in(error.plain())))
            terminal.flush()


def _version(asked: bool) -> None:
    if asked:
        emit(f"moenas {moenas.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Describe a family of mixture-of-experts language models; get back its Pareto front."""


def _say_what_is_taken() -> None:
    """Say on stderr which files of the folders here are used."""
    from moenas import resources

    resources.listener = say


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The space file to write.")],
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME|PATH",
            help="Start from this space, or from the config.json of a Hugging Face model.",
        ),
    ] = None,
    shrink: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE=VALUE",
            help="Make that model smaller: d_model=128, n_layers=4, vocab_size=256, n_experts=8.",
        ),
    ] = None,
) -> None:
    """Write a commented space file to edit, and the schema that editors check it by."""
    from moenas.cli.init import start_text
    from moenas.space.space import file_schema

    text = start_text(start, shrink or [])
    if path.suffix != ".yaml":
        raise InputError(f"{path}: the name of a space file ends in .yaml")
    schema = path.parent / "moenas.schema.json"
    header = f"# yaml-language-server: $schema={schema.name}\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(header + text)
        schema.write_text(json.dumps(file_schema(), indent=1) + "\n", encoding="utf-8")
    except FileExistsError:
        raise InputError(f"{path}: exists already; give another name") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    say(f"wrote {path} and {schema}")
    say(f"next: moenas check {path}")


@app.command()
def check(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="Name or path of a space file, or a .py file of your own."
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...")] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Random architectures to look at; 200 if left out, fewer if over 100 layers deep.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Check a space: is it valid, how many points, what do they cost, what do they look like."""
    _say_what_is_taken()
    url = server_url(storage, server)
    if space.endswith(".py"):
        if server is not None:
            raise InputError(f"{space}: a server checks space files; leave --server out")
        from moenas.testing.parts import check_file

        for line in check_file(Path(space)):
            emit(line)
        return
    if url is not None:
        report = open_server(url).check(space, overrides or (), draws=draws)
    else:
        report = _checked(space, overrides or [], draws, storage)
    if output is Output.json:
        emit(to_json(report))
    elif output is Output.csv:
        write_csv(report["draws"])
    else:
        from moenas.report.latency_text import predicted_text
        from moenas.report.space_check import check_text
        from moenas.study.estimate import Estimate

        words = ["calibrate", space, *(overrides or [])]
        calibrate = None if url is not None else command(words, {"storage": storage})
        lines = [check_text(report), *predicted_text(report.get("latency", []), calibrate)]
        emit("\n".join([*lines, *Estimate(**report["estimate"]).lines()]))


def _checked(space: str, overrides: list[str], draws: int | None, storage: str | None) -> Plain:
    """Return the report on a space, and what a study of it will take."""
    from moenas.report.space_check import check_report
    from moenas.space.space import Space
    from moenas.study.calibration import predicted_latency
    from moenas.study.estimate import estimate

    loaded = Space.load(space, overrides)
    return check_report(loaded, draws) | {
        "latency": predicted_latency(loaded, storage),
        "estimate": estimate(loaded, storage=storage).plain(),
    }


@app.command()
def run(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="Name or path of a space file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="e.g. train.tokens=2e6"),
    ] = None,
    storage: Storage = None,
    trials: Trials = None,
    workers: Workers = None,
    address: Address = None,
    accept_changes: AcceptChanges = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    log: Log = None,
    on_end: OnEnd = None,
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Launch a study, or resume it; prints its front at the end."""
    _say_what_is_taken()
    url = server_url(storage, server)
    options: dict[str, object] = {"storage": storage, "trials": trials, "workers": workers}
    options |= {"address": address, "server": server, "fresh": fresh}
    options |= {"log": log, "on_end": on_end}
    hint = command_line(["run", space, *(overrides or ())], options)
    if url is not None:
        from moenas.cli import server_run

        local = {"workers": workers, "address": address, "accept-changes": accept_changes}
        server_run.refuse_local_options(local | {"fresh": fresh, "log": log, "on-end": on_end})
        wanted = server_run.ServerRun(space, overrides or [], trials, hint, server)
        connected = open_server(url)
        return wanted.estimate(connected, output) if dry_run else wanted.run(connected, output)
    from moenas.cli.watching import Watchers
    from moenas.space.space import Space
    from moenas.study import launch
    from moenas.workers.pool import names_cluster

    loaded = Space.load(space, overrides or ())
    if not names_cluster(address):
        launch.require_named_device(loaded)
    _say_notes(loaded)
    count = worker_count(workers)
    if dry_run:
        estimate = launch.dry_run(loaded, storage=storage, trials=trials, workers=count)
        return write_estimate(estimate.plain(), output)
    study = _run_here(
        loaded,
        hint,
        Watchers(log or (), on_end),
        storage=storage,
        trials=trials,
        workers=count,
        address=address,
        accept_changes=accept_changes,
        fresh=fresh,
    )
    front = open_source(study.store.url, None).front(study.name)
    write_front(front, output)
    say_next_steps(front, {"storage": without_password(storage) if storage else None})


def _run_here(space: Space, hint: str, watchers: Watchers, **options: Any) -> Study:
    """Run a study in this process; `hint` is the command that resumes it.

    Raises:
        typer.Exit: if the run is interrupted, or ends before the study does.
    """
    from moenas.study import launch

    try:
        with watchers.listeners(space, options["storage"]) as listeners:
            return launch.run(space, listeners=listeners, **options)
    except launch.Interrupted as stop:
        say(f"stopped: {stop}. Nothing is lost; resume with:\n  {hint}")
        raise typer.Exit(stop.exit_code) from None
    except (StorageLostError, EnvironmentFaultError, StudyStoppedError) as error:
        say(f"moenas: {error}")
        say(f"Nothing is lost; resume with:\n  {hint}")
        raise typer.Exit(error.exit_code) from None


def _say_notes(space: Space) -> None:
    """Say on stderr what should be known of the space file and the corpus before a study runs."""
    from moenas.evaluate.matching import notes, open_corpus

    for note in notes(space, open_corpus(space)):
        say(note)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]")] = None,
    storage: Storage = None,
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Say how far a study is and how it does; without a name, list the studies."""
    from moenas.report.summary import counted_studies, status_text

    source = open_source(storage, server)
    if study is None:
        write_rows(counted_studies(source.studies()), output)
        return
    report = source.status(study)
    if output is Output.table:
        emit(status_text(report))
    else:
        write_rows([report], output, single=True)


@app.command()
def front(
    study: StudyName,
    storage: Storage = None,
    server: Server = None,
    output: Format = Output.table,
) -> None:
    """Print the Pareto front of a study."""
    write_front(open_source(storage, server).front(study), output)


@app.command()
def show(
    study: StudyName,
    trial: TrialNumber,
    storage: Storage = None,
    server: Server = None,
    output: Format = Output.table,
    full: Annotated[
        bool, typer.Option("--full", help="Print fields that have their defaults, too.")
    ] = False,
) -> None:
    """Print one trial: its architecture, its numbers and how they were measured."""
    from moenas.report.summary import trial_text

    report = open_source(storage, server).trial(study, trial)
    if output is Output.table:
        emit(trial_text(report, full=full))
    else:
        write_rows([report], output, single=True)


@app.command()
def report(
    study: StudyName,
    storage: Storage = None,
    server: Server = None,
    allow_code: AllowCode = False,
    output: Format = Output.table,
) -> None:
    """Say what a study shows of its space: importance of holes, effects of their values."""
    from moenas.report.insights_text import insights_text

    insights_report = open_source(storage, server).report(study, allow_code=allow_code)
    if output is Output.csv:
        write_csv(
            [
                {"objective": name, **effect}
                for name, objective in insights_report["objectives"].items()
                for effect in objective["effects"]
            ]
        )
    else:
        emit(to_json(insights_report) if output is Output.json else insights_text(insights_report))


@app.command()
def dashboard(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="Loopback address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    server: NoServer = None,
) -> None:
    """Open the Optuna dashboard with the notes and figures of every study."""
    from moenas.dashboard.server import serve
    from moenas.store.store import Store

    _say_what_is_taken()
    listening = serve(Store.open(storage), host, port)
    say(f"dashboard at {listening.url} (Ctrl-C stops it)")
    try:
        listening.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
        raise typer.Exit(130) from None


@app.command()
def export(
    study: StudyName,
    trial: TrialNumber,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    storage: Storage = None,
    server: Server = None,
    allow_code: AllowCode = False,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="folder: PyTorch source; transformers: the layout of a family of Hugging Face;"
            " torch_export: a traced program; onnx: the same in ONNX.",
        ),
    ] = "folder",
) -> None:
    """Write a trial's trained model to a folder that runs without moenas."""
    from moenas.export.formats import NOTES

    source = open_source(storage, server)
    folder = source.export(study, trial, out, format=format, allow_code=allow_code)
    emit(str(folder))
    for line in NOTES[format]:
        say(line.format(folder=folder))


@app.command()
def schema() -> None:
    """Print the JSON Schema of space files."""
    from moenas.space.space import file_schema

    emit(to_json(file_schema(), indent=1))


app.add_typer(calibration_commands.commands)
app.add_typer(maintenance_commands.commands)
app.add_typer(lifecycle_commands.commands)
app.add_typer(server_commands.commands)
app.add_typer(service_commands.commands)
app.add_typer(service_commands.token)
