"""The samplers and the early stopping of moenas as methods of the simulation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from replay.simulate import Params, Proposal, TrainsToTheEnd

from moenas import Space
from moenas.records import Evaluation, RungResult
from moenas.search.evolution import Evolution
from moenas.search.gray_box import Described, GrayBox
from moenas.search.halving import Halving
from moenas.search.neighbours import Point, point
from moenas.search.predictive import Prediction
from moenas.search.rungs import Rule, Rungs
from moenas.space.early_stopping import Predictive, SuccessiveHalving

START = datetime(2026, 1, 1)
STOPS_AT = (3, 6)
"""Points of the recorded curve nearest to a third and two thirds, where moenas has its rungs."""


class Random(TrainsToTheEnd):
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

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Learn nothing."""

    def stopped(self, number: int) -> None:
        """Take in that a candidate is not trained to its end."""

    def learn_from(self, rungs: Rungs) -> None:
        """Learn nothing from candidates at a rung."""


class Proposer(Protocol):
    """A sampler that proposes points by the trials so far."""

    def propose(self, number: int, trials: Iterable[FrozenTrial]) -> Params | None:
        """Return the parameters of a trial, or None if a random draw will do."""


class SamplerMethod(Random):
    """A sampler of moenas, every candidate trained to its end."""

    def __init__(self, space: Space, seed: int, make: Callable[[Space], Proposer]) -> None:
        super().__init__(space.with_search(seed=seed), seed)
        self._sampler = make(self.space)
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
        objective_values = [values[o.name] for o in self.space.objectives]
        trial = _trial(
            Proposal(number, self._trials[number].params), TrialState.COMPLETE, objective_values
        )
        trial.datetime_complete = ended
        self._trials[number] = trial

    def learn_from(self, rungs: Rungs) -> None:
        """Let `gray_box` estimate the losses of candidates at a rung."""
        if isinstance(self._sampler, GrayBox):
            self._sampler.rungs = rungs

    def stopped(self, number: int) -> None:
        """Give the candidate to the sampler as a pruned trial."""
        self._told += 1
        trial = _trial(Proposal(number, self._trials[number].params), TrialState.PRUNED)
        trial.datetime_complete = START + timedelta(seconds=self._told)
        self._trials[number] = trial


class CostsUnknown(GrayBox):
    """The sampler `gray_box` without exact costs: it predicts all objectives.

    It shows what the exact costs are worth.
    """

    def _describe(self, candidate: Point) -> Described:
        described = super()._describe(candidate)
        features = {k: v for k, v in described.features.items() if not k.startswith("cost.")}
        return replace(described, features=features, exact={})


def gray_box(space: Space, seed: int) -> SamplerMethod:
    """Return the sampler `gray_box`."""
    return SamplerMethod(space, seed, GrayBox)


def costs_unknown(space: Space, seed: int) -> SamplerMethod:
    """Return the sampler `gray_box` without exact costs."""
    return SamplerMethod(space, seed, CostsUnknown)


def evolution(space: Space, seed: int) -> SamplerMethod:
    """Return the sampler `evolution`."""
    return SamplerMethod(space, seed, Evolution)


class Stopping:
    """A sampler whose candidates pause at STOPS_AT until a rule of early stopping resumes them."""

    def __init__(self, sampler: Random, rule: Rule) -> None:
        self._sampler, self._rule, self._space = sampler, rule, sampler.space
        self._rungs = Rungs()
        sampler.learn_from(self._rungs)
        self._paused: dict[int, int] = {}
        self._params: dict[int, Params] = {}

    def ask(self) -> Proposal | None:
        """Ask the sampler."""
        proposal = self._sampler.ask()
        if proposal is not None:
            self._params[proposal.number] = proposal.params
        return proposal

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        """Pause the candidate at a rung of the rule."""
        if rung not in STOPS_AT:
            return True
        drawn = point(self._space, 0, self._params[number])
        assert drawn is not None
        known = {name: value for name, value in values.items() if name != "val_loss"}
        result = RungResult(number, 1 + STOPS_AT.index(rung), rung, values["val_loss"], known)
        cost = self._space.cost(drawn.architecture).plain()
        self._rungs.add(result, drawn.architecture.plain(), cost)
        self._paused[number] = result.rung
        return False

    def resumed(self, *, at_end: bool) -> int | None:
        """Return the candidate that the rule lets train on."""
        for number in self._rule.hopeless(self._rungs, self._paused):
            del self._paused[number]
            self._sampler.stopped(number)
        number = self._rule.promotable(self._rungs, self._paused, at_end=at_end)
        if number is not None:
            del self._paused[number]
        return number

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Tell the sampler, and the rule."""
        self._sampler.tell(number, values)
        metrics = {"val_loss": values["val_loss"]}
        self._rungs.complete[number] = Evaluation(
            "", number, 1, "complete", "", values=dict(values), metrics=metrics
        )


def halving(space: Space) -> Halving:
    """Return successive halving with the settings that moenas has by default."""
    exact = {o.name: o.direction for o in space.objectives if o.needs != "training"}
    return Halving(SuccessiveHalving(), exact)


def predictive(space: Space) -> Prediction:
    """Return predictive early stopping with the settings that moenas has by default."""
    return Prediction(Predictive(), space)


def _trial(proposal: Proposal, state: TrialState, values: list[float] | None = None) -> FrozenTrial:
    """Return a trial of Optuna with the number of a proposal."""
    options = {name: CategoricalDistribution([value]) for name, value in proposal.params.items()}
    trial = create_trial(state=state, values=values, params=proposal.params, distributions=options)
    trial.number = proposal.number
    return trial
