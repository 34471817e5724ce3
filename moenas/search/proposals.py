"""The sampler of each trial: one of Optuna's, or one that answers with a whole point."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler

from moenas.errors import MoenasError
from moenas.failures import error_line
from moenas.search.points import Points
from moenas.search.samplers import Setup, make

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from moenas.search.evolution import Evolution
    from moenas.search.gray_box import GrayBox
    from moenas.search.rungs import Rungs
    from moenas.space.space import Space

log = logging.getLogger(__name__)

REPEATS = 10
"""Draws in a row without a new candidate after which a point that was not drawn is proposed."""


class Proposals:
    """Gives the sampler that Optuna asks for the parameters of a trial."""

    def __init__(self, space: Space, points: Points, rungs: Rungs | None) -> None:
        """Take the points that the study has drawn, and its rungs; others keep both up to date."""
        self._space, self._points, self._rungs = space, points, rungs
        self._setup = Setup(space.search.seed, any(hole.given for hole in space.holes))
        self._of_the_user: BaseSampler | None = None

    def sampler(self, number: int) -> BaseSampler:
        """Return the sampler of a trial that has its parameters.

        Optuna's samplers by name are made for each trial, so that a resumed study asks what an
        uninterrupted one asks. A class of the user's may keep state, so one instance serves a run.
        """
        name = self._space.search.sampler
        if ".py:" not in name:
            return make(name, self._setup, number)
        if self._of_the_user is None:
            self._of_the_user = make(name, self._setup, number)
        return self._of_the_user

    def proposing(
        self, number: int, fruitless: int, trials: Callable[[], Sequence[FrozenTrial]]
    ) -> BaseSampler:
        """Return the sampler of a new trial.

        `trials` reads those of the study. After REPEATS `fruitless` draws in a row, a point of a
        finite space that was not drawn is proposed in place of the sampler's.
        """
        name = self._space.search.sampler
        base = RandomSampler(seed=self._setup.seed_of(number))
        if name == "grid" or fruitless >= REPEATS:
            if self._points.enumerable and (point := self._points.unseen()) is not None:
                return _fixed(point, base)
            if fruitless % REPEATS == 0:  # a space too large to be listed
                return base
        elif self._proposer is not None:
            try:
                proposed = self._proposer.propose(number, trials())
            except (MoenasError, StorageInternalError):
                raise
            except Exception as error:  # of the surrogate's fit; the study goes on
                log.warning("%s: %s; trial %d is drawn at random", name, error_line(error), number)
                return base
            return base if proposed is None else _fixed(proposed, base)
        return self.sampler(number)

    @cached_property
    def _proposer(self) -> GrayBox | Evolution | None:
        """The sampler of ours that proposes whole points; imported only where it is used."""
        if self._space.search.sampler == "gray_box":
            from moenas.search.gray_box import GrayBox

            return GrayBox(self._space, self._rungs)
        if self._space.search.sampler == "evolution":
            from moenas.search.evolution import Evolution

            return Evolution(self._space)
        return None


def _fixed(params: dict[str, Any], base: BaseSampler) -> BaseSampler:
    """Return a sampler that answers with these parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(params, base)
