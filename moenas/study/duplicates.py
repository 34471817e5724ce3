"""Trials of one model: it is evaluated once, and the other trials get a copy of the result."""

from __future__ import annotations

from collections.abc import Collection

from moenas.records import Evaluation
from moenas.study.candidate import Candidate
from moenas.study.stop_rules import FINAL


class DuplicateModels:
    """Finds trials whose model is evaluated already, or is being evaluated, by its fingerprint."""

    def __init__(self) -> None:
        self._evaluated: dict[str, int] = {}
        """Fingerprint -> the first trial of that model whose result another one can copy."""
        self._waiting: dict[str, list[Candidate]] = {}
        """Fingerprint -> candidates that wait for the running one of the same model."""

    def waiting(self, paused: Collection[str]) -> int:
        """Return how many candidates wait for one that is not among the `paused` fingerprints."""
        return sum(len(c) for name, c in self._waiting.items() if name not in paused)

    def add(self, evaluation: Evaluation) -> None:
        """Remember a finished trial if another trial of its model would have the same result.

        Recipe, data and seed are the study's, so that a model that diverged diverges again.
        """
        trained = evaluation.status != "failed" and bool(evaluation.values)
        trained |= evaluation.status == "stopped"
        if trained or (evaluation.failure is not None and evaluation.failure.kind in FINAL):
            self._evaluated.setdefault(evaluation.fingerprint, evaluation.trial)

    def source(self, candidate: Candidate) -> int | None:
        """Return the trial whose result a candidate copies, or None."""
        return self._evaluated.get(candidate.fingerprint)

    def wait(self, candidate: Candidate) -> None:
        """Let a candidate wait for the running one of the same model."""
        self._waiting.setdefault(candidate.fingerprint, []).append(candidate)

    def release(self, candidate: Candidate) -> list[Candidate]:
        """Return the candidates that waited for this one."""
        return self._waiting.pop(candidate.fingerprint, []) if candidate.fingerprint else []
