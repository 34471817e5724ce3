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
from moenas.store import replicates, tables
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
    objectives, files of components, device and versions are the same. Under a budget of seconds
    the training tokens must be the same, too; a candidate that is not timed has no known number.
    """

    def __init__(self, store: StudyStore, space: Space) -> None:
        self._store, self._space = store, space
        self._studies: dict[str, _Study] = {}
        self._names = frozenset(objective.name for objective in space.objectives)
        self._device: Plain = {}

    def open(self, device: str) -> None:
        """Look for studies that were evaluated as this one is; `device` is the pool's device."""
        space = self._space
        own, cached_device = self._store.study(), devices.named(device)
        dtype = training_dtype(space.train, cached_device)
        self._device = devices.device_info(cached_device, space.train.threads, dtype)
        meaning = _meaning(own, space.plain())
        if meaning is None:
            return
        objectives = {objective.name: objective.info().sha256 for objective in space.objectives}
        for other in self._store.store.studies():
            digests = {info["name"]: info["sha256"] for info in other.objectives}
            same = _meaning(other, with_current_defaults(other.space)) == meaning
            if other.name != own.name and same:
                shared = frozenset(name for name, _ in objectives.items() & digests.items())
                seed = other.space.get("search", {}).get("seed")
                self._studies[other.name] = _Study(seed, shared)

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
        whole = {name: s for name, s in self._studies.items() if s.objectives == self._names}
        studies = [name for name, study in whole.items() if study.seed == own]
        for evaluation in self._evaluations(studies, fingerprint):
            if self._is_whole(evaluation) and self._is_same(evaluation, own, tokens):
                return evaluation
        if seed is None or not whole:
            return None
        others = list(whole)
        rows = self._store.store.query(
            lambda connection: replicates.of_model(connection, others, fingerprint, seed)
        )
        same = (row for row in rows if self._is_whole(row) and self._is_same(row, own, tokens))
        return next(same, None)

    def find_trained(self, fingerprint: str) -> Evaluation | None:
        """Return an evaluation of this architecture that lacks objectives of this study, or None.

        It has the values that hold here, and its weights: the others can be measured from them.
        None if no objective needs training, or under a budget of seconds.
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
            and self._is_same(evaluation, seed, None)
        ]
        return max(found, key=lambda evaluation: len(evaluation.values), default=None)

    def _without_others(self, evaluation: Evaluation) -> Evaluation:
        """Return an evaluation without objectives that this study lacks, or measures otherwise."""
        shared = self._studies[evaluation.study].objectives
        values = {k: v for k, v in evaluation.values.items() if k in shared}
        measurements = {k: v for k, v in evaluation.measurements.items() if k in shared}
        return replace(evaluation, values=values, measurements=measurements)

    def _is_whole(self, evaluation: Evaluation) -> bool:
        return evaluation.values.keys() >= self._names

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
            if (stored := store.evaluation(study, trial)) is not None:
                yield stored

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
