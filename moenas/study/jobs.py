"""Jobs of one study, from the space, the corpus and the study's reference times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moenas.errors import StorageLostError
from moenas.records import Job, Plain
from moenas.space.objective import Objective
from moenas.store.study_store import StudyStore
from moenas.store.weights import is_shared

if TYPE_CHECKING:
    from moenas.data.corpus import Corpus
    from moenas.space.space import Space


class Jobs:
    """Writes the jobs of one study."""

    def __init__(
        self, store: StudyStore, space: Space, corpus: Corpus, *, elsewhere: bool = False
    ) -> None:
        """Take what the jobs share.

        With `elsewhere`, workers may run on other machines: the corpus is published for them if
        the root of the weights is a URL.

        Raises:
            StorageLostError: if the corpus cannot be published.
        """
        self._store, self._space, self._data_sha256 = store, space, corpus.sha256
        self._data_at: Plain | None = None
        if elsewhere and is_shared(store.runs):
            from moenas.data.published import publish

            try:
                self._data_at = publish(store.runs, corpus)
            except OSError as error:
                raise StorageLostError(
                    f"{error.filename}: the corpus cannot be written: {error.strerror}"
                ) from error

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
            data_at=self._data_at,
            train=space.train.plain(),
            measure=space.measure.plain(),
            seed=space.search.seed,
            use={file.path: file.source for file in space.use},
            time_limit_s=space.search.time_limit,
            reference_ms=self._store.reference_ms(),
            **more,
        )
