"""The command `run` against a server: a study is submitted or resumed, and followed to its end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from moenas import terminal
from moenas.cli.options import Output
from moenas.cli.progress import listener
from moenas.cli.results import say_next_steps, write_estimate, write_front
from moenas.errors import InputError, StorageLostError
from moenas.grammar.summary import one_line
from moenas.records import Evaluation, Plain
from moenas.study.events import Event, Kind, Listener
from moenas.study.progress import Progress
from moenas.terminal import say

if TYPE_CHECKING:
    from moenas.service.client import Server
    from moenas.service.remote_study import RemoteStudy
    from moenas.store.study_events import StudyEvent

INTERRUPTED = 130
STATES = {
    "submitted": "queued",
    "started": "running",
    "paused": "paused",
    "resumed": "queued",
    "extended": "extended",
    "requeued": "queued",
    "restarted": "queued",
    "cancelled": "cancelled",
}
"""Kind of an event -> what its line says of the state of the study."""


@dataclass(frozen=True)
class ServerRun:
    """What `run` is asked to run on a server."""

    space: str
    overrides: Sequence[str]
    trials: int | None
    hint: str
    """The command that follows the study again."""
    option: str | None
    """The value of --server, if it was given."""

    def estimate(self, server: Server, output: Output) -> None:
        """Write what the study will take."""
        more = [] if self.trials is None else [f"search.trials={self.trials}"]
        report = server.check(self.space, [*self.overrides, *more])
        write_estimate(report["estimate"], output)

    def run(self, server: Server, output: Output) -> None:
        """Submit or resume the study, follow it to its end, and write its front.

        Raises:
            InputError: if the server refuses the space.
            StudyStoppedError: if the study fails or is cancelled.
            typer.Exit: if Ctrl-C or a lost server ends the following; the study goes on.
        """
        study = server.run(self.space, self.overrides, trials=self.trials)
        self._follow(study)
        front = study.front_report()
        write_front(front, output)
        say_next_steps(front, {"server": self.option})

    def _follow(self, study: RemoteStudy) -> None:
        units: dict[str, str] = {}
        again = f"The study goes on; follow it with:\n  {self.hint}"
        try:
            with listener(study.name, units) as listen:
                follower = StudyFollower(study, listen, units)
                study.wait(follower.on_event)
                follower.finish()
        except KeyboardInterrupt:
            say(f"stopped following study '{study.name}'. {again}")
            cancel = terminal.command(["cancel", study.name], {"server": self.option})
            say(f"`{cancel}` ends the study")
            raise typer.Exit(INTERRUPTED) from None
        except StorageLostError as error:
            say(f"moenas: {error}")
            say(again)
            raise typer.Exit(error.exit_code) from None


def refuse_local_options(options: Mapping[str, object]) -> None:
    """Check that no option of a local run is given.

    Raises:
        InputError: naming the first one.
    """
    for flag, value in options.items():
        if value:
            raise InputError(f"--{flag}: a server decides this for its studies; leave it out")


class StudyFollower:
    """Turns the events of a study of a server into those that a local run has."""

    def __init__(self, study: RemoteStudy, listen: Listener, units: dict[str, str]) -> None:
        self._study, self._listen, self._units = study, listen, units
        self._began, self._running = time.monotonic(), set[int]()
        detail = study.detail()
        self._reached_before = _reached(detail["progress"])
        self._tell("state", None, _state_text(detail["state"], detail["reason"], study.name))
        if self._reached_before:
            count = self._reached_before
            self._tell("resumed", None, f"study '{study.name}' has {count} finished trials")

    def on_event(self, event: StudyEvent) -> None:
        """Take one event of the server."""
        data, trial = event.data, event.data.get("trial")
        if event.kind in STATES:
            text = _state_text(STATES[event.kind], data.get("reason"), self._study.name)
            self._tell("state", None, text)
        elif event.kind == "trial_started":
            self._running.add(data["trial"])
            self._tell("started", trial, f"attempt {data['attempt']}")
        elif event.kind == "trial_promoted":
            self._running.add(data["trial"])
            self._tell("promoted", trial, f"rung {data['rung']}")
        elif event.kind == "trial_paused":
            self._running.discard(data["trial"])
            loss = data["val_loss"]
            told = "" if loss is None else f", validation loss {loss:.4f}"
            self._tell("paused", trial, f"rung {data['rung']}{told}")
        elif event.kind == "trial_finished":
            self._running.discard(data["trial"])
            self._finished(data["trial"])
        elif event.kind == "trial_replicated":
            self._tell("replicated", trial, f"seed {data['seed']}")

    def finish(self) -> None:
        """Tell that the study is over."""
        self._tell("done", None, f"study '{self._study.name}' is finished")

    def _finished(self, trial: int) -> None:
        """Tell of a finished trial with its architecture and the reason of its failure."""
        report = self._study.trial(trial)
        evaluation = Evaluation.parse(report)
        architecture = report["architecture"]
        text = one_line(architecture) if architecture else ""
        kind: Kind = "finished"
        if evaluation.reused_from is not None:
            source = evaluation.reused_from
            kind = "reused"
            text = f"reused from trial {source['trial']} of study '{source['study']}' | {text}"
        elif evaluation.is_copy:
            kind = "copied"
            text = f"the same model as trial {evaluation.metrics['copied_from']:.0f}"
        elif evaluation.status in ("infeasible", "stopped"):
            kind = "infeasible" if evaluation.status == "infeasible" else "stopped"
        self._tell(kind, trial, text, evaluation)

    def _tell(
        self, kind: Kind, trial: int | None, text: str, evaluation: Evaluation | None = None
    ) -> None:
        detail = self._study.detail()
        self._units |= {o["name"]: o["unit"] for o in detail["objectives"]}
        self._listen(Event(kind, trial, text, evaluation, self._progress(detail)))

    def _progress(self, detail: Plain) -> Progress:
        """Return how far the study is, with the time left at the pace since the following began."""
        said, total = detail["progress"], detail["trials"]
        here = _reached(said) - self._reached_before
        pace = (time.monotonic() - self._began) / here if here > 0 else None
        return Progress(
            total=total,
            running=len(self._running),
            evaluated=said["evaluated"],
            complete=said["complete"],
            failed=said["failed"],
            infeasible=said["infeasible"],
            repeated=said["repeated"],
            best={name: value for name, value in said["best"].items() if value is not None},
            front=said["front"],
            hypervolume=said["hypervolume"],
            eta_s=None if pace is None else pace * max(0, total - _reached(said)),
            at_rungs=said["paused"],
            paused=said["paused"],
            stopped=said["stopped"],
        )


def _reached(progress: Plain) -> int:
    """Return the candidates that are evaluated or wait at a rung."""
    return int(progress["evaluated"] + progress["paused"])


def _state_text(state: str, reason: str | None, study: str) -> str:
    """Say in which state a study is, and what continues a paused one."""
    text = state if not reason else f"{state}; {' '.join(reason.split())}"
    if state == "paused":
        text += f"; `{terminal.command(['resume', study])}` continues it"
    return text
