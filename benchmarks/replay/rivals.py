"""Published search methods, by their own packages, as methods of the simulation.

Optuna is a dependency of moenas. Ray Tune and Syne Tune come with `pip install "moenas[rivals]"`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import optuna
from replay.methods import Random
from replay.simulate import Method, Params, Proposal, TrainsToTheEnd
from replay.table import RUNGS

from moenas import Space

Options = dict[str, tuple[list[Any], dict[str, Any]]]
"""Hole -> its values, and the values of other holes that it depends on."""


def options(space: Space) -> Options:
    """Return the holes of a space that has choices alone."""
    return {hole.name: (list(hole.tree.labels), hole.given) for hole in space.holes}  # type: ignore[union-attr]


def is_active(given: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a hole that depends on the values `given` is there."""
    return all(values[other] == value for other, value in given.items())


def active(config: Mapping[str, Any], holes: Options) -> Params:
    """Return the holes of a flat configuration that its other values leave active."""
    return {name: config[name] for name, (_, given) in holes.items() if is_active(given, config)}


class OptunaMethod(TrainsToTheEnd):
    """A sampler of Optuna in its own loop of ask and tell, over the conditional space.

    It stops no candidate: Optuna prunes studies of one objective alone.
    """

    def __init__(self, space: Space, sampler: optuna.samplers.BaseSampler) -> None:
        self._holes = options(space)
        self._names = [objective.name for objective in space.objectives]
        self._study = optuna.create_study(
            directions=[o.direction for o in space.objectives], sampler=sampler
        )
        self._trials: dict[int, optuna.Trial] = {}

    def ask(self) -> Proposal | None:
        """Ask the study, and suggest the active holes in order."""
        trial = self._study.ask()
        params: Params = {}
        for name, (labels, given) in self._holes.items():
            if is_active(given, params):
                params[name] = trial.suggest_categorical(name, labels)
        self._trials[trial.number] = trial
        return Proposal(trial.number, params)

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Tell the study."""
        self._study.tell(self._trials.pop(number), [values[name] for name in self._names])


class RayTuneMethod(TrainsToTheEnd):
    """Ray Tune's OptunaSearch over the flat space, as its loop calls it."""

    def __init__(self, space: Space, seed: int) -> None:
        from ray import tune
        from ray.tune.search.optuna import OptunaSearch

        self._holes = options(space)
        names = [objective.name for objective in space.objectives]
        self._search = OptunaSearch(
            {name: tune.choice(labels) for name, (labels, _) in self._holes.items()},
            metric=names,
            mode=[objective.direction[:3] for objective in space.objectives],
            seed=seed,
        )
        self._asked = 0

    def ask(self) -> Proposal | None:
        """Ask for a suggestion."""
        config = self._search.suggest(str(self._asked))
        self._asked += 1
        return Proposal(self._asked - 1, active(config, self._holes))

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Report the result."""
        self._search.on_trial_complete(str(number), dict(values))


class SyneTuneMethod:
    """A scheduler of Syne Tune over the flat space."""

    def __init__(self, space: Space, make: Callable[[dict[str, Any], list[str]], Any]) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.config_space import choice

        self._holes, self._trial_class = options(space), Trial
        self._names = [objective.name for objective in space.objectives]
        domains = {name: choice(labels) for name, (labels, _) in self._holes.items()}
        self._scheduler = make(domains, self._names)
        self._trials: dict[int, Any] = {}

    def ask(self) -> Proposal | None:
        """Ask for a suggestion."""
        suggestion = self._scheduler.suggest()
        if suggestion is None:
            return None
        number = len(self._trials)
        trial = self._trial_class(
            trial_id=number, config=suggestion.config, creation_time=datetime.now()
        )
        self._trials[number] = trial
        self._scheduler.on_trial_add(trial)
        return Proposal(number, active(suggestion.config, self._holes))

    def goes_on(self, number: int, rung: int, values: Mapping[str, float]) -> bool:
        """Report the values at a rung; the scheduler decides."""
        from syne_tune.optimizer.scheduler import SchedulerDecision

        decision = self._scheduler.on_trial_result(self._trials[number], self._result(rung, values))
        return bool(decision == SchedulerDecision.CONTINUE)

    def resumed(self, *, at_end: bool) -> int | None:
        """Resume nothing: a stopped candidate stays stopped."""
        return None

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Report the values at the end."""
        self._scheduler.on_trial_complete(self._trials[number], self._result(RUNGS, values))

    def _result(self, rung: int, values: Mapping[str, float]) -> dict[str, float]:
        return {name: values[name] for name in self._names} | {"training_iteration": rung}


def moasha(domains: dict[str, Any], names: list[str], seed: int) -> Any:
    """Return Syne Tune's MOASHA with its default reduction factor."""
    from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

    return MOASHA(domains, names, max_t=RUNGS, grace_period=1, random_seed=seed)


def evolution(domains: dict[str, Any], names: list[str], seed: int) -> Any:
    """Return Syne Tune's multi-objective regularised evolution."""
    from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution
    from syne_tune.optimizer.schedulers.single_fidelity_scheduler import SingleFidelityScheduler

    searcher = MultiObjectiveRegularizedEvolution(
        domains, population_size=20, sample_size=5, random_seed=seed
    )
    return SingleFidelityScheduler(
        domains, names, do_minimize=True, searcher=searcher, random_seed=seed
    )


def methods() -> dict[str, Callable[[Space, int], Method]]:
    """Return the rivals by name; making one raises ImportError without its package."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    samplers = optuna.samplers
    return {
        "random": Random,
        "optuna TPE": lambda s, seed: OptunaMethod(s, samplers.TPESampler(seed=seed)),
        "optuna NSGA-II": lambda s, seed: OptunaMethod(
            s, samplers.NSGAIISampler(population_size=20, seed=seed)
        ),
        "optuna GP": lambda s, seed: OptunaMethod(s, samplers.GPSampler(seed=seed)),
        "ray tune OptunaSearch": RayTuneMethod,
        "syne tune MOASHA": lambda s, seed: SyneTuneMethod(s, lambda d, n: moasha(d, n, seed)),
        "syne tune evolution": lambda s, seed: SyneTuneMethod(
            s, lambda d, n: evolution(d, n, seed)
        ),
    }
