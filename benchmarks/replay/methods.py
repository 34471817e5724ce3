"""The samplers of moenas as methods of the simulation."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import datetime, timedelta

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from replay.simulate import Params, Proposal

from moenas import Space
from moenas.search.gray_box import GrayBox
from moenas.search.neighbours import point

START = datetime(2026, 1, 1)


class Random:
    """Random search without repeats."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self._draw = space, random.Random(seed)
        self._seen: set[str] = set()
        self._asked = 0

    def ask(self) -> Proposal | None:
        """Draw a point that was not proposed; None if a thousand draws give none."""
        for _ in range(1000):
            drawn = point(self.space, self._draw.getrandbits(48))
            if drawn is not None and drawn.architecture.fingerprint not in self._seen:
                return self.proposal(drawn.params, drawn.architecture.fingerprint)
        return None

    def proposal(self, params: Params, fingerprint: str) -> Proposal:
        """Number a proposal."""
        self._seen.add(fingerprint)
        self._asked += 1
        return Proposal(self._asked - 1, params)

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        """Train every candidate to its end."""
        return True

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Learn nothing."""


class GrayBoxMethod(Random):
    """The sampler `gray_box`, every candidate trained to its end."""

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(space.with_search(seed=seed), seed)
        self._sampler = GrayBox(self.space)
        self._trials: list[FrozenTrial] = []
        self._told = 0

    def ask(self) -> Proposal | None:
        """Ask the sampler; where it has no proposal, the next candidate is drawn at random."""
        params = self._sampler.propose(len(self._trials), self._trials)
        if params is None:
            proposal = super().ask()
        else:
            drawn = point(self.space, 0, params)
            assert drawn is not None
            proposal = self.proposal(params, drawn.architecture.fingerprint)
        if proposal is not None:
            self._trials.append(_trial(proposal, TrialState.RUNNING))
        return proposal

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Give the values to the sampler, as an Optuna trial."""
        self._told += 1
        ended = START + timedelta(seconds=self._told)
        found = [values[o.name] for o in self.space.objectives]
        trial = _trial(Proposal(number, self._trials[number].params), TrialState.COMPLETE, found)
        trial.datetime_complete = ended
        self._trials[number] = trial


def _trial(proposal: Proposal, state: TrialState, values: list[float] | None = None) -> FrozenTrial:
    """Return a trial of Optuna with the number of a proposal."""
    options = {name: CategoricalDistribution([value]) for name, value in proposal.params.items()}
    trial = create_trial(state=state, values=values, params=proposal.params, distributions=options)
    trial.number = proposal.number
    return trial
