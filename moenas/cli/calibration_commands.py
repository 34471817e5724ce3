"""The command that measures a space on a device and stores a predictor of its latencies."""

from __future__ import annotations

from typing import Annotated

import typer

from moenas.cli.options import Format, NoServer, Output, Storage, write_csv
from moenas.terminal import emit, say, to_json

commands = typer.Typer()
"""The commands on calibrations, which the command line includes."""


@commands.command()
def calibrate(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="Name or path of a space file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="e.g. measure.decode_batch=1"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda", help="Device to measure on. Default: where candidates run."
        ),
    ] = None,
    models: Annotated[
        int, typer.Option(min=6, max=10_000, help="Whole models that are measured.")
    ] = 40,
    storage: Storage = None,
    server: NoServer = None,
    output: Format = Output.table,
) -> None:
    """Measure models of a space on this device; store a predictor of its latencies."""
    from moenas.report.latency_text import calibration_text
    from moenas.space.space import Space
    from moenas.study.calibration import calibrate as calibrate_space

    def progress(done: int, total: int, line: str) -> None:
        say(f"[{done}/{total}] {line}")

    loaded = Space.load(space, overrides or ())
    made = calibrate_space(loaded, storage=storage, device=device, models=models, progress=progress)
    if output is Output.json:
        emit(to_json([one.plain() for one in made]))
    elif output is Output.csv:
        write_csv([{"objective": one.objective, **row} for one in made for row in one.held_out])
    else:
        emit("\n".join(line for one in made for line in calibration_text(one)))
