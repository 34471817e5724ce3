"""Output of commands about a study: its front, the next commands, and its expected cost."""

from __future__ import annotations

from collections.abc import Mapping

from moenas import terminal
from moenas.cli.options import Output, write_rows
from moenas.records import Plain
from moenas.terminal import emit, say


def write_front(report: Plain, output: Output) -> None:
    """Write the front to stdout, and its device and data to stderr."""
    from moenas.report.front_report import front_rows

    is_short = output is Output.table
    write_rows(front_rows(report, short_form=is_short), output)
    if is_short:
        for line in report["caption"]:
            say(line)


def say_next_steps(front: Plain, where: Mapping[str, object]) -> None:
    """Say what to type next; `where` holds the option that names the database or the server."""
    if not front["members"]:
        return
    name, best = front["study"], front["members"][0]
    steps = [(["show", name, str(best["trial"])], "one candidate, whole")]
    if "storage" in where:
        steps.append((["dashboard"], "the Optuna dashboard with the figures"))
    if best["has_weights"]:
        steps.append((["export", name, str(best["trial"]), "out/"], "the trained PyTorch module"))
    say("next:")
    for words, what in steps:
        say(f"  {terminal.command(words, where):<36} # {what}")


def write_estimate(estimate: Plain, output: Output) -> None:
    """Write what a study will take to stdout."""
    if output is Output.table:
        from moenas.study.estimate import Estimate

        emit("\n".join(Estimate(**estimate).lines()))
    else:
        write_rows([estimate], output, single=True)
