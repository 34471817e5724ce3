"""Jobs of one study: what each has from the space, the corpus and the study's reference times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moenas.records import Job, Plain
from moenas.space.objective import Objective
from moenas.store.study_store import StudyStore

if TYPE_CHECKING:
    from moenas.space.space import Space


class Jobs:
    """Writes the jobs of one study."""

    def __init__(self, store: StudyStore, space: Space, data_sha256: str) -> None:
        self._store, self._space, self._data_sha256 = store, space, data_sha256

    def job(
        self,
        trial: int,
        attempt: int,
        architecture: Plain,
        objectives: Sequence[Objective] | None = None,
        **more: Any,
    ) -> Job:
        """Return the job of a trial, of all objectives of the space if none are given.

        `more` are fields of `Job` that the study does not decide.
        """
        space = self._space
        chosen = space.objectives if objectives is None else objectives
        return Job(
            study=space.name,
            trial=trial,
            attempt=attempt,
            architecture=architecture,
            objectives={o.name: o.source if o.from_user else None for o in chosen},
            data=space.data,
            data_sha256=self._data_sha256,
            train=space.train.plain(),
            measure=space.measure.plain(),
            seed=space.search.seed,
            use={file.path: file.source for file in space.use},
            time_limit_s=space.search.time_limit,
            reference_ms=self._store.reference_ms(),
            **more,
        )
