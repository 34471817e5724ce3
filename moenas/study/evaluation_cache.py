"""Evaluations of other studies in the database that hold for a candidate of this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import Connection, select

from moenas.evaluate import devices
from moenas.evaluate.dtypes import training_dtype
from moenas.evaluate.job import versions
from moenas.records import Evaluation, Plain, StudyRecord
from moenas.space.stored_form import with_current_defaults
from moenas.store import replicates, row_readers, tables
from moenas.store.study_store import StudyStore

if TYPE_CHECKING:
    from moenas.space.space import Space

SAME_DEVICE = ("kind", "name", "threads", "dtype", "host")
"""What two devices have in common on which the same values are measured."""
SAME_VERSIONS = ("moenas", "torch", "cuda")


@dataclass(frozen=True)
class _Study:
    """Another study whose evaluations mean the same but for the seed and the objectives."""

    seed: int | None
    """None where none is stored."""
    objectives: frozenset[str]
    """The objectives of this study that the other one measures by the same files."""


class EvaluationCache:
    """Finds evaluations that can be reused; it is empty until `open`.

    An evaluation holds for a candidate if fingerprint, corpus, recipe, seed, measure protocol,
    files of components, device and versions are the same. `find` wants the same objectives, too.
    Under a budget of seconds the training tokens must be the same; a candidate that is not timed
    has no known number.
    """

    def __init__(self, store: StudyStore, space: Space) -> None:
        self._store, self._space = store, space
        self._studies: dict[str, _Study] = {}
        self._digests = {o.name: o.info().sha256 for o in space.objectives}
        self._meaning: Plain | None = None
        self._device: Plain = {}

    def open(self, device: str) -> None:
        """Look for studies that were evaluated as this one is; `device` is the pool's device."""
        space = self._space
        own, cached_device = self._store.study(), devices.named(device)
        dtype = training_dtype(space.train, cached_device)
        self._device = devices.device_info(cached_device, space.train.threads, dtype)
        self._meaning = _meaning(own, space.plain())
        for other in self._store.store.studies():
            study = self._compared(other)
            if other.name != own.name and study is not None:
                self._studies[other.name] = study

    def _compared(self, other: StudyRecord) -> _Study | None:
        """Return what this study can reuse of another one; None if their values differ."""
        meaning = _meaning(other, with_current_defaults(other.space))
        if meaning is None or meaning != self._meaning:
            return None
        digests = {info["name"]: info["sha256"] for info in other.objectives}
        shared = frozenset(name for name, _ in self._digests.items() & digests.items())
        return _Study(other.space.get("search", {}).get("seed"), shared)

    def find(
        self, fingerprint: str, seed: int | None = None, tokens: int | None = None
    ) -> Evaluation | None:
        """Return an evaluation of this architecture that can be reused, or None.

        With a `seed` it is one of a replicate: an evaluation of a study of that seed, or a
        replicate. Without one it is of a study with the seed of this one, and has its weights.
        `tokens` are those that a budget of seconds has given the candidate.
        """
        if self._space.train.has_time_budget and tokens is None:
            return None
        own = self._space.search.seed if seed is None else seed
        names = self._digests.keys()
        others = {name: s for name, s in self._studies.items() if s.objectives == names}
        studies = [name for name, study in others.items() if study.seed == own]
        for evaluation in self._evaluations(studies, fingerprint):
            if evaluation.values.keys() >= names and self._is_same(evaluation, own, tokens):
                return evaluation
        if seed is None or not others:
            return None
        rows = self._store.store.query(
            lambda connection: replicates.of_model(connection, list(others), fingerprint, seed)
        )
        same = (
            row for row in rows if row.values.keys() >= names and self._is_same(row, own, tokens)
        )
        return next(same, None)

    def find_trained(self, fingerprint: str) -> Evaluation | None:
        """Return an evaluation of this architecture whose weights can be measured, or None.

        It has only the values that hold here. A reused evaluation does not say how long training
        took, and one of a model that looks ahead does not say where, so neither is returned. None
        if no objective needs training, or under a budget of seconds.
        """
        objectives, seed = self._space.objectives, self._space.search.seed
        trains = any(objective.needs == "training" for objective in objectives)
        if not trains or self._space.train.has_time_budget:
            return None
        studies = [name for name, study in self._studies.items() if study.seed == seed]
        found = [
            self._without_others(evaluation)
            for evaluation in self._evaluations(studies, fingerprint)
            if evaluation.weights_sha256 is not None
            and "val_loss" in evaluation.metrics
            and "train" in evaluation.seconds
            and evaluation.metrics.get("causal") != 0
            and self._is_same(evaluation, seed, None)
        ]
        return max(found, key=lambda evaluation: len(evaluation.values), default=None)

    def _without_others(self, evaluation: Evaluation) -> Evaluation:
        """Return an evaluation without objectives that this study lacks, or measures otherwise."""
        shared = self._studies[evaluation.study].objectives
        values = {k: v for k, v in evaluation.values.items() if k in shared}
        measurements = {k: v for k, v in evaluation.measurements.items() if k in shared}
        return replace(evaluation, values=values, measurements=measurements)

    def _evaluations(self, studies: list[str], fingerprint: str) -> Iterator[Evaluation]:
        """Yield the complete evaluations of an architecture in some studies, the oldest first."""
        if not (studies and fingerprint):
            return
        candidate, evaluation = tables.candidate.c, tables.evaluation.c
        same = (candidate.study == evaluation.study) & (candidate.trial == evaluation.trial)
        wanted = (
            select(evaluation.study, evaluation.trial)
            .join(tables.candidate, same)
            .where(
                candidate.fingerprint == fingerprint,
                candidate.study.in_(studies),
                evaluation.status == "complete",
            )
            .order_by(evaluation.recorded_at)
        )

        def read(connection: Connection) -> list[tuple[str, int]]:
            return [(row.study, row.trial) for row in connection.execute(wanted)]

        store = self._store.store
        for study, trial in store.query(read):
            stored = store.evaluation(study, trial)
            if stored is not None and self._is_unchanged(study):
                yield stored

    def _is_unchanged(self, study: str) -> bool:
        """Whether a study is the one that `open` saw, or one that means the same."""
        records = self._store.store.query(lambda found: row_readers.studies(found, study))
        return any(self._compared(record) == self._studies[study] for record in records)

    def _is_same(self, evaluation: Evaluation, seed: int, tokens: int | None) -> bool:
        """Whether an evaluation was made on this device, by these versions, and is no copy."""
        here = versions()
        return (
            not evaluation.is_copy
            and evaluation.seed == seed
            and (tokens is None or evaluation.metrics.get("train_tokens") == tokens)
            and all(evaluation.device.get(key) == self._device[key] for key in SAME_DEVICE)
            and all(evaluation.versions.get(key) == here.get(key) for key in SAME_VERSIONS)
        )


def _meaning(record: StudyRecord, plain: Plain) -> Plain | None:
    """Return all of a study but its seed that the value of an architecture depends on.

    None if the stored study does not say all of it: its evaluations hold for no other study.
    """
    files = [file.get("sha256") for file in plain.get("use", [])]
    recipe = {name: plain.get(name) for name in ("train", "measure")}
    meaning = {**recipe, "data": record.data.get("sha256"), "use": files}
    return None if None in (*meaning.values(), *files) else meaning
