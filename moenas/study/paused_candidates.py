"""Candidates that paused at a rung: promotion, stop, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from moenas.errors import InputError
from moenas.records import Evaluation, Plain, RungResult
from moenas.search.halving import Halving
from moenas.search.rungs import Rule, Rungs, trust
from moenas.space.early_stopping import Predictive, SuccessiveHalving
from moenas.store import rungs as rung_rows
from moenas.store.checkpoints import (
    checkpoint_at,
    read_checkpoint,
    remove_checkpoints,
    unused_checkpoints,
)
from moenas.store.files import remove_file
from moenas.store.rungs import Pause
from moenas.store.study_store import StudyStore
from moenas.store.weights import is_shared
from moenas.study.candidate import Candidate
from moenas.study.events import EventEmitter

if TYPE_CHECKING:
    from moenas.space.space import Space


class PausedCandidates:
    """The candidates of a study that wait at a rung.

    Order of writes at a rung: the checkpoint under a name of its own, then the row of the rung.
    Then the checkpoint of the rung before is removed. A promotion is a row before the job is
    started. So a run that was killed continues each candidate from its latest row.
    """

    def __init__(self, store: StudyStore, space: Space, events: EventEmitter, rungs: Rungs) -> None:
        self._store, self._space, self._events = store, space, events
        self._rule: Rule | None = _open_rule(space)
        self._rungs = rungs
        """What is known of all candidates at their rungs; this object keeps it up to date."""
        self.pauses: dict[int, Pause] = {}
        """Trial -> where it paused last, of the trials without an evaluation."""
        self._waiting: dict[int, Candidate] = {}
        """Trial -> candidate that waits at its rung."""
        self._promoted: list[Candidate] = []
        """Candidates that train on as soon as a worker is free."""
        self._distrusted: set[int] = set()
        """Rungs whose cut is widened."""

    @property
    def enabled(self) -> bool:
        """Whether the space has early stopping."""
        return self._rule is not None

    def __len__(self) -> int:
        """Return how many candidates are paused."""
        return len(self._waiting) + len(self._promoted)

    def __iter__(self) -> Iterator[Candidate]:
        yield from self._waiting.values()
        yield from self._promoted

    def load(self, stored: Mapping[int, Evaluation]) -> None:
        """Take in what earlier runs have stored, and remove checkpoints that nobody needs."""
        if not self.enabled:
            return
        self.pauses.update(rung_rows.pauses(self._store.store, self._store.name))
        used = {trial: pause.result.rung for trial, pause in self.pauses.items()}
        for path in unused_checkpoints(self._store.runs, self._store.name, used):
            remove_file(path)
        results = rung_rows.results(self._store.store, self._store.name)
        plains = self._store.store.architectures(self._store.name) if results else {}
        for result in results:
            plain = plains[result.trial]
            self._rungs.add(result, plain, self._cost(plain))
        for evaluation in stored.values():
            self._add_complete(evaluation)
        self._tell_trust()

    def _cost(self, plain: Plain) -> dict[str, int]:
        return self._space.cost_record(self._space.architecture(plain))

    # --- one candidate -------------------------------------------------------------------------

    def take_back(self, candidate: Candidate) -> bool:
        """Let a candidate of an earlier run wait at the rung where it paused; False if it did not.

        One that was promoted trains on first.
        """
        pause = self.pauses.get(candidate.number)
        if pause is None:
            return False
        if pause.result.promoted:
            self._promoted.append(candidate)
        else:
            self._waiting[candidate.number] = candidate
        return True

    def job_fields(self, candidate: Candidate) -> Plain:
        """Return the fields that only the job of a paused candidate has.

        A candidate whose checkpoint cannot be read is trained again from its start.
        """
        if not self.enabled:
            return {}
        limits: list[float | None] = [None] * self._space.train.rungs
        fields: Plain = {"rung_limits": limits}
        number = candidate.number
        pause = self.pauses.get(number)
        if pause is None:
            return fields
        place = self._store.runs, self._store.name, number, pause.result.rung
        digest = pause.evaluation.weights_sha256
        fields_of_pause: Plain = {"paused": pause.evaluation.plain()}
        try:
            if is_shared(self._store.runs):
                fields_of_pause["checkpoint_at"] = checkpoint_at(*place, digest)
            else:
                fields_of_pause["checkpoint"] = read_checkpoint(*place, digest)
        except InputError as error:
            self._events.warn(f"it is trained again from its start: {error}", number)
            self._forget(number)
            if (tokens := pause.evaluation.metrics.get("train_tokens")) is not None:
                fields["train_tokens"] = int(tokens)
            return fields
        return fields | fields_of_pause

    def _forget(self, trial: int) -> None:
        """Remove the rungs of a trial that is trained again from its start."""
        name = self._store.name
        self._store.store.apply(name, lambda connection: rung_rows.forget(connection, name, trial))
        del self.pauses[trial]
        self._rungs.forget(trial)
        remove_checkpoints(self._store.runs, name, trial)

    def pause(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Store the result of a candidate at a rung, and let it wait there."""
        number, point = candidate.number, evaluation.curve[-1]
        result = RungResult(
            trial=number,
            rung=int(evaluation.metrics["rung"]),
            tokens=point["tokens"],
            val_loss=point["val_loss"],
            known=evaluation.values,
        )
        rung_rows.add(self._store.store, result, evaluation)
        remove_checkpoints(self._store.runs, self._store.name, number, but=result.rung)
        self.pauses[number] = Pause(result, evaluation)
        self._rungs.add(result, candidate.plain, candidate.cost)
        self._waiting[number] = candidate
        text = (
            f"rung {result.rung} of {self._space.train.rungs}, validation loss"
            f" {result.val_loss:.4f} | {candidate.summary}"
        )
        self._events.emit("paused", number, text)

    def finished(self, evaluation: Evaluation) -> None:
        """Take in the evaluation of a trial that continues no more, after it was stored."""
        if not self.enabled:
            return
        self.pauses.pop(evaluation.trial, None)
        remove_checkpoints(self._store.runs, self._store.name, evaluation.trial)
        self._add_complete(evaluation)
        self._tell_trust()

    def _add_complete(self, evaluation: Evaluation) -> None:
        """Take in a complete trial, whose final loss the rungs are compared with."""
        if evaluation.status == "complete" and not evaluation.is_copy:
            self._rungs.complete[evaluation.trial] = evaluation

    def _tell_trust(self) -> None:
        """Tell once when the cut of a rung widens, and when it is as before."""
        least = getattr(self._space.search.early_stopping, "min_correlation", 0.0)
        for rung, agreement in self._rungs.agreements().items():
            low = trust(least, agreement) < 1
            if low == (rung in self._distrusted):
                continue
            self._distrusted ^= {rung}
            effect = "its cut is widened" if low else "its cut is no longer widened"
            self._events.warn(
                f"rung {rung}: the rank correlation with the final losses is"
                f" {agreement.correlation:.2f} over {agreement.pairs} candidates; {effect}"
            )

    # --- decisions -----------------------------------------------------------------------------

    def next(self, *, at_end: bool = False) -> Candidate | None:
        """Return the candidate that trains on now, or None; its promotion is stored.

        `at_end`: the study draws no more candidates.
        """
        if self._promoted:
            return self._promoted.pop(0)
        if self._rule is None or not self._waiting:
            return None
        number = self._rule.promotable(self._rungs, self._at(), at_end=at_end)
        if number is None:
            return None
        pause = self.pauses[number]
        rung_rows.promote(self._store.store, self._store.name, number, pause.result.rung)
        result = replace(pause.result, promoted=True)
        self.pauses[number] = replace(pause, result=result)
        candidate = self._waiting.pop(number)
        self._rungs.add(result, candidate.plain, candidate.cost)
        return candidate

    def hopeless(self) -> list[Candidate]:
        """Return the candidates that the rule stops now; they wait no more."""
        if self._rule is None or not self._waiting:
            return []
        return [self._waiting.pop(n) for n in self._rule.hopeless(self._rungs, self._at())]

    def rest(self) -> list[Candidate]:
        """Return all candidates that wait; they wait no more."""
        candidates = list(self._waiting.values())
        self._waiting.clear()
        return candidates

    def stopped(self, candidate: Candidate) -> Evaluation:
        """Return the last evaluation of a candidate that is stopped at its rung."""
        evaluation = self.pauses[candidate.number].evaluation
        attempt = self._store.attempts(candidate.number)
        return replace(evaluation, attempt=attempt, status="stopped", weights_sha256=None)

    def _at(self) -> dict[int, int]:
        """Return trial -> rung, of the candidates that wait."""
        return {number: self.pauses[number].result.rung for number in self._waiting}


def _open_rule(space: Space) -> Rule | None:
    """Return the rule of a space; None without early stopping."""
    settings = space.search.early_stopping
    if isinstance(settings, SuccessiveHalving):
        directions = {o.name: o.direction for o in space.objectives if o.needs != "training"}
        unknown = any(o.needs == "training" and o.name != "val_loss" for o in space.objectives)
        return Halving(settings, directions, stand_in=unknown)
    if isinstance(settings, Predictive):
        from moenas.search.predictive import Prediction  # features of architectures

        return Prediction(settings, space)
    return None
