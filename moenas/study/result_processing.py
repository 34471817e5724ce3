"""From the result of a worker to the evaluation that is stored, with its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from moenas.errors import FailureKind, InputError, StorageLostError
from moenas.pareto import unusable
from moenas.records import Evaluation, Failure, Plain, WeightsFile
from moenas.space.objective import Objective, apply_reference_times
from moenas.store.checkpoints import write_checkpoint
from moenas.store.files import remove_file
from moenas.store.study_store import StudyStore
from moenas.store.weights import (
    adopt_draft,
    copy_weights,
    for_job,
    remove_drafts,
    weights_path,
    write_weights,
)
from moenas.study.candidate import Candidate
from moenas.workers.pool import Result

if TYPE_CHECKING:
    from moenas.model.architecture import Architecture
    from moenas.space.space import Space


class ResultProcessor:
    """Turns results of one study into evaluations."""

    def __init__(self, store: StudyStore, space: Space) -> None:
        self._store, self._space, self._study = store, space, space.name
        self._names = [o.name for o in space.objectives]
        self._timed: dict[str, str] = {}
        """Objective -> the key of the reference time that all its values share."""
        self._trained_on: str | None = None
        """Under a budget of seconds, the name of the device that all candidates train on."""

    def add(self, evaluation: Evaluation) -> None:
        """Take in a stored evaluation: its device becomes the device of the study's latencies."""
        if evaluation.status == "complete":
            self._trained_on = self._trained_on or evaluation.device.get("name")
            for name, details in evaluation.measurements.items():
                if "reference_key" in details:
                    self._timed.setdefault(name, details["reference_key"])

    def evaluation(self, candidate: Candidate, result: Result) -> Evaluation:
        """Return what is to be stored of a result; write the weights if there are any.

        Raises:
            StorageLostError: if the weights cannot be written.
        """
        outcome, source = result.outcome, candidate.source
        if isinstance(outcome, Failure):
            attempt, seed = result.job.attempt, self._space.search.seed
            known = {"failure": outcome, "seed": seed}
            outcome = candidate.evaluation(self._study, attempt, "failed", **known)
            if source is None:
                return outcome
        if source is not None:
            outcome = self._with_measured(source, outcome)
        evaluation = replace(outcome, fingerprint=candidate.fingerprint, cost=candidate.cost)
        if evaluation.status == "complete":
            judged = self.judge(candidate.architecture, evaluation)
            evaluation, candidate.trained_violations = judged
        elif evaluation.status == "paused":
            return self._paused(evaluation, result)
        digest = None
        # The weights of a candidate whose objective failed are kept, so that it can be remeasured.
        if source is not None:
            digest = source.weights_sha256
            if evaluation.status == "infeasible":
                digest = None
                remove_file(weights_path(self._store.runs, self._study, candidate.number))
        elif result.weights is not None and evaluation.status != "infeasible":
            place = self._store.runs, self._study, candidate.number
            with self.writing():
                if isinstance(result.weights, WeightsFile):
                    digest = adopt_draft(weights_path(*place), result.weights)
                else:
                    digest = write_weights(*place, result.weights)
        self.remove_drafts(candidate.number)
        return replace(evaluation, weights_sha256=digest)

    def job_of_source(self, candidate: Candidate) -> tuple[list[Objective], Plain]:
        """Return the objectives that a candidate is to be measured for, and fields of its job.

        Those are all of the study, and no field, unless another study has trained its model. Then
        the trial gets the weights from there, and the job measures the missing objectives. A known
        latency with another reference time than the study's is measured again.
        """
        every, source = list(self._space.objectives), candidate.source
        if source is None:
            return every, {}
        keys = {name: d.get("reference_key") for name, d in source.measurements.items()}
        other = [n for n, key in keys.items() if key is not None and self._timed.get(n, key) != key]
        values = {name: value for name, value in source.values.items() if name not in other}
        missing = [objective for objective in every if objective.name not in values]
        known = replace(source, values=values)
        fields: Plain = {"known": known.plain()}
        try:
            digest = self._take_weights(candidate, source)
            if digest is not None and any(o.needs == "training" for o in missing):
                fields |= for_job(self._store.runs, self._study, candidate.number, digest)
        except InputError:  # they are gone, so the model is trained
            missing = []
        if not missing:
            candidate.source = None
            return every, {}
        candidate.source = known
        return missing, fields

    def _with_measured(self, known: Evaluation, outcome: Evaluation) -> Evaluation:
        """Return the evaluation of another study with the objectives that were measured here."""
        return replace(
            known,
            study=self._study,
            trial=outcome.trial,
            attempt=outcome.attempt,
            status=outcome.status,
            failure=outcome.failure,
            values=known.values | outcome.values,
            measurements=known.measurements | outcome.measurements,
            seconds=outcome.seconds,
            reused_from={"study": known.study, "trial": known.trial},
        )

    def _paused(self, evaluation: Evaluation, result: Result) -> Evaluation:
        """Return the evaluation of a candidate that paused; write its checkpoint.

        It is failed if a latency was timed on another device than before in the study, or if there
        is no checkpoint.
        """
        evaluation = self._refuse_other_device(self._rescale_latency(evaluation))
        rung = evaluation.metrics.get("rung", 0.0)
        losses = [row["val_loss"] for row in evaluation.curve[-1:] if "val_loss" in row]
        if evaluation.status == "paused" and (result.weights is None or rung < 1 or not losses):
            text = "paused without a checkpoint, or without a loss at a rung"
            evaluation = failed(evaluation, "invalid", text)
        digest = None
        if evaluation.status == "paused" and result.weights is not None:
            place = self._store.runs, self._study, evaluation.trial
            with self.writing():
                digest = write_checkpoint(*place, int(rung), result.weights)
        self.remove_drafts(evaluation.trial)
        return replace(evaluation, weights_sha256=digest)

    def remove_drafts(self, trial: int, result: Result | None = None) -> None:
        """Remove what workers have written of a trial and not sent, such as one that was killed."""
        file = None if result is None else result.weights
        but = file if isinstance(file, WeightsFile) else None
        remove_drafts(self._store.runs, self._study, trial, but)

    def judged(self, architecture: Architecture | None, evaluation: Evaluation) -> Evaluation:
        """Return a complete evaluation with the study's reference times, if it can be complete.

        It is failed if a value cannot be used, infeasible if the trained model breaks a
        requirement.
        """
        return self.judge(architecture, evaluation)[0]

    def judge(
        self, architecture: Architecture | None, evaluation: Evaluation
    ) -> tuple[Evaluation, dict[str, float]]:
        """Return what `judged` does, and the violation of each requirement of the trained model.

        See `Space.trained_violations`; there are none if the evaluation failed.
        """
        evaluation = self._refuse_other_device(evaluation)
        if evaluation.status == "failed":
            return evaluation, {}
        why = unusable({name: evaluation.values.get(name, math.nan) for name in self._names})
        if why is not None:
            return failed(evaluation, "error", why), {}
        return self._apply_trained_requirements(architecture, self._rescale_latency(evaluation))

    def copy(self, candidate: Candidate, source: int) -> tuple[Evaluation, str | None]:
        """Return the evaluation of an earlier trial of the same model, for a candidate.

        The second item says why the weights are not copied, if they are not.
        """
        original = self._store.evaluation(source)
        assert original is not None
        digest, warning = original.weights_sha256, None
        if digest is not None:
            try:
                with self.writing():
                    copy_weights(self._store.runs, self._study, source, candidate.number, digest)
            except InputError as error:
                digest, warning = None, f"its weights are not copied: {error}"
        candidate.trained_violations = self.trained_violations(original, candidate.architecture)
        copied = replace(
            original,
            trial=candidate.number,
            attempt=self._store.attempts(candidate.number),
            seconds={},
            metrics={**original.metrics, "copied_from": float(source)},
            weights_sha256=digest,
        )
        return copied, warning

    def reuse(self, candidate: Candidate, source: Evaluation) -> Evaluation | None:
        """Return an evaluation of another study for a candidate; None if it cannot be reused.

        It cannot be reused if its weights are gone, or its latencies have another reference time.
        """
        try:
            self._take_weights(candidate, source)
        except InputError:
            return None
        reused = replace(
            source,
            study=self._study,
            trial=candidate.number,
            attempt=self._store.attempts(candidate.number),
            values={name: source.values[name] for name in self._names},
            measurements={k: v for k, v in source.measurements.items() if k in self._names},
            metrics={k: v for k, v in source.metrics.items() if k != "copied_from"},
            cost=candidate.cost,
            seconds={},
            reused_from={"study": source.study, "trial": source.trial},
        )
        judged, candidate.trained_violations = self.judge(candidate.architecture, reused)
        return None if judged.status == "failed" else judged

    def _take_weights(self, candidate: Candidate, source: Evaluation) -> str | None:
        """Copy the weights of an evaluation of another study, if it has any; return their SHA-256.

        Raises:
            InputError: if they are gone. StorageLostError: if they cannot be written.
        """
        if source.weights_sha256 is not None:
            place = self._store.runs, self._study, source.trial, candidate.number
            with self.writing():
                copy_weights(*place, source.weights_sha256, of=source.study)
        return source.weights_sha256

    def trained_violations(
        self, evaluation: Evaluation, architecture: Architecture | None = None
    ) -> dict[str, float]:
        """Return requirement of the trained model -> by how much it is broken, over 0, or met.

        Empty if the evaluation has not all values. None takes the stored architecture.
        """
        measured = evaluation.status != "failed" and evaluation.values.keys() >= set(self._names)
        if not measured or not any(r.trained for r in self._space.requirements):
            return {}
        if architecture is None:
            plain = self._store.architecture(evaluation.trial)
            architecture = self._space.architecture(plain)
        return self._space.trained_violations(architecture, evaluation.routing, evaluation.values)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say that the storage is lost if a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise StorageLostError(
                f"{error.filename or self._store.runs}: cannot be written: {error.strerror}"
            ) from error

    def _refuse_other_device(self, evaluation: Evaluation) -> Evaluation:
        """Refuse a candidate that another device model trained, under a budget of seconds."""
        name, first = evaluation.device.get("name"), self._trained_on
        if not self._space.train.has_time_budget or first is None or name == first:
            return evaluation
        text = f"trained on [{name}], but the seconds of this study are for [{first}]"
        return failed(evaluation, "refused", text)

    def _rescale_latency(self, evaluation: Evaluation) -> Evaluation:
        """Express latencies by the study's reference times; refuse latencies of another device."""
        keys = {
            name: (details["reference_key"], details["reference_ms"])
            for name, details in evaluation.measurements.items()
            if "reference_key" in details
        }
        for name, (key, _) in keys.items():
            if (first := self._timed.get(name, key)) != key:
                text = f"'{name}' was timed on [{key}], but before in this study on [{first}]"
                return failed(evaluation, "refused", text)
        fixed = {key: self._store.set_reference_ms(key, ms) for key, ms in keys.values()}
        return apply_reference_times(evaluation, fixed)

    def _apply_trained_requirements(
        self, architecture: Architecture | None, evaluation: Evaluation
    ) -> tuple[Evaluation, dict[str, float]]:
        """Make an evaluation infeasible if the trained model breaks a requirement."""
        if evaluation.status != "complete" or architecture is None:
            return evaluation, {}
        violations = self.trained_violations(evaluation, architecture)
        broken = {name: value for name, value in violations.items() if value > 0}
        if not broken:
            return evaluation, violations
        return replace(evaluation, status="infeasible", violations=broken), violations


def failed(evaluation: Evaluation, kind: FailureKind, message: str) -> Evaluation:
    """Turn an evaluation into a failed one."""
    return replace(evaluation, status="failed", failure=Failure(kind, message))
