"""The budgets of `search.stop`: the spending of a study, and the budget that is used up."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moenas.errors import MoenasError
from moenas.records import EndReason, Evaluation, Plain
from moenas.store import spending
from moenas.store.spending import Spending
from moenas.store.study_store import StudyStore

if TYPE_CHECKING:
    from moenas.space.sections import Stop

REPORT_S = 10.0
"""Seconds between two reports of the wall time; a run that is killed loses as much at most."""


class Budget:
    """The spending of a study, against its budgets."""

    def __init__(self, store: StudyStore, stop: Stop | None) -> None:
        self._store, self._stop = store, stop
        self._before = Spending()
        """What earlier runs, and this one up to its last evaluation, have spent."""
        self._paused: dict[int, Spending] = {}
        """Trial -> what its training has taken, of the candidates that wait at a rung."""
        self._volumes: list[float] = []
        """Hypervolume after each evaluated candidate."""
        self._began, self._began_at = time.monotonic(), ""
        self._reported = 0.0

    def start(self) -> None:
        """Load what earlier runs have spent; the wall time of this run counts from now on."""
        self._before = spending.recorded(self._store.store, self._store.name)
        self._paused = spending.of_paused(self._store.store, self._store.name)
        self._began = time.monotonic()
        self._began_at = datetime.now(UTC).isoformat(timespec="microseconds")
        self._load_volumes()
        self.report(last=True)  # readers know the run by its row

    def add(self, evaluation: Evaluation) -> None:
        """Count an evaluation of this run, which is stored already."""
        self._paused.pop(evaluation.trial, None)
        self._before += spending.of_evaluation(evaluation)
        self._load_volumes()

    def pause(self, trial: int, tokens: int, cost: Plain) -> None:
        """Count the training of a candidate that waits at a rung, after `tokens`."""
        self._paused[trial] = spending.of_pause(tokens, cost)

    def report(self, *, last: bool = False) -> None:
        """Store the wall time of this run every REPORT_S seconds, and at its end.

        A database that does not take it is no reason to end a run: other writes tell that.
        """
        seconds = time.monotonic() - self._began
        if last or seconds - self._reported >= REPORT_S:
            self._reported = seconds
            with contextlib.suppress(MoenasError):
                study = self._store
                spending.report_run(study.store, study.name, self._began_at, seconds)

    @property
    def spent(self) -> Spending:
        """What all runs have spent up to now."""
        before = self._before + Spending(time.monotonic() - self._began)
        return sum(self._paused.values(), start=before)

    @property
    def used_up(self) -> EndReason | None:
        """Which budget is used up, or None."""
        stop, spent = self._stop, self.spent
        if stop is None:
            return None
        if stop.wall_seconds is not None and spent.wall_seconds >= stop.wall_seconds:
            return "wall_time"
        if stop.train_flops is not None and spent.train_flops >= stop.train_flops:
            return "train_flops"
        if stop.train_tokens is not None and spent.train_tokens >= stop.train_tokens:
            return "train_tokens"
        return "plateau" if self._has_plateau() else None

    def _has_plateau(self) -> bool:
        """Whether the hypervolume has hardly grown over the last evaluated candidates."""
        rule = self._stop.plateau if self._stop is not None else None
        if rule is None or len(self._volumes) <= rule.trials:
            return False
        before, now = self._volumes[-1 - rule.trials], self._volumes[-1]
        return before > 0 and now - before < rule.improvement * before

    def _load_volumes(self) -> None:
        """Read the hypervolumes: a new worst value moves the point that all are measured from."""
        if self._stop is not None and self._stop.plateau is not None:
            self._volumes = spending.volumes(self._store.store, self._store.name)

    def text(self, end: EndReason) -> str:
        """Say which budget is used up, and by how much."""
        stop, spent = self._stop, self.spent
        assert stop is not None
        if end == "wall_time":
            took = f"its runs took {spent.wall_seconds:,.0f} s"
            return f"{took}, search.stop.wall_time is {stop.wall_time}"
        if end == "train_flops":
            return (
                f"it spent {spent.train_flops:.3g} training FLOPs, search.stop.train_flops is"
                f" {stop.train_flops:.3g}"
            )
        if end == "train_tokens":
            return (
                f"it spent {spent.train_tokens:.3g} training tokens, search.stop.train_tokens is"
                f" {stop.train_tokens:.3g}"
            )
        assert stop.plateau is not None
        return (
            f"the hypervolume grew by less than {stop.plateau.improvement:.3g} of itself over the"
            f" last {stop.plateau.trials} evaluated candidates"
        )
