"""Requirements on a latency that a calibration shows to be broken before a candidate is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.evaluate import devices
from moenas.predict.block_latency import predicted
from moenas.store import calibrations
from moenas.study import repairs
from moenas.study.calibration import latency_objectives, parts_digest, workload_key

if TYPE_CHECKING:
    from moenas.grammar.requirements import Requirement
    from moenas.records import Calibration
    from moenas.space.space import Space
    from moenas.store.study_store import StudyStore
    from moenas.study.candidate import Candidate

MARGIN = 2.0
"""Factor on the width of an interval, in logarithms, within which a latency certainly is. The
interval itself holds for untrained routers, and one of ten models lies outside of it."""


class LatencyBounds:
    """Refuses candidates whose predicted latency is certainly outside; empty until `open`.

    A prediction decides nothing else: it is no value of a trial.
    """

    def __init__(self, store: StudyStore, space: Space) -> None:
        self._store, self._space = store, space
        self._bounds: list[tuple[Requirement, Calibration]] = []

    def open(self, device: str, *, newest: bool = False) -> None:
        """Take the calibrations for the bounds of the space; `device` is that of the pool.

        A study keeps the one that it took first under a workload. With `newest` it goes over to the
        newest one, and the change is stored.
        """
        bounded = {requirement.bounded_latency for requirement in self._space.requirements}
        known: dict[str, Calibration | None] = {}
        parts = parts_digest(self._space)
        for objective in latency_objectives(self._space):
            if objective.name in bounded:
                key = workload_key(self._space, objective, devices.named(device))
                known[objective.name] = self._calibration(parts, key, newest)
        self._bounds = [
            (requirement, calibration)
            for requirement in self._space.requirements
            if (calibration := known.get(requirement.bounded_latency or "")) is not None
        ]

    def _calibration(self, parts: str, workload: str, newest: bool) -> Calibration | None:
        """Return the calibration of the study under a workload; None if there is none yet."""
        store, study = self._store.store, self._store.name
        kept = calibrations.of_study(store, study, parts, workload)
        latest = calibrations.of_workload(store, parts, workload) if newest else None
        if kept is None or latest is None or latest.made_at <= kept.made_at:
            return kept
        store.apply(study, lambda c: repairs.renew_calibration(c, study, kept, latest))
        return latest

    def apply(self, candidate: Candidate) -> None:
        """Add the requirements that a candidate certainly breaks to its violations."""
        if not self._bounds or candidate.architecture is None or candidate.broken:
            return
        references = self._store.reference_ms()
        for requirement, calibration in self._bounds:
            reference_ms = references.get(calibration.workload)
            foreseen = predicted(calibration, candidate.architecture, reference_ms)
            if foreseen.beyond:
                continue
            wide = calibration.factor**MARGIN
            layers = self._space.layer_names(candidate.architecture)
            by = min(
                requirement.violation([{**n, calibration.objective: latency} for n in layers])
                for latency in (foreseen.value / wide, foreseen.value * wide)
            )
            if by > 0:
                candidate.violations[requirement.text] = by
                candidate.predicted[f"predicted_{calibration.objective}"] = foreseen.value
                candidate.invalid = (
                    f"{requirement.text}: {calibration.objective} is predicted to be"
                    f" {foreseen.value:.3g} {calibration.unit} ({foreseen.value / wide:.3g} to"
                    f" {foreseen.value * wide:.3g})"
                )
