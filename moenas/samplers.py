"""Optuna's side of a study: the samplers by name, asking and telling."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import Trial, TrialState

from moenas.describe import one_line
from moenas.errors import InputError, suggestion
from moenas.records import Evaluation, Plain
from moenas.refs import load_module
from moenas.store import Store

if TYPE_CHECKING:
    from moenas.space import Space

POPULATION = 24
"""NSGA's trials in a generation: studies of some hundred trials see several generations, and on
such budgets 24 found as much hypervolume as Optuna's 50."""


@dataclass(frozen=True)
class Setup:
    """What a sampler is chosen for."""

    seed: int
    """The study's seed."""
    conditional: bool
    """Some parameters exist only where an option of another was drawn."""


def derived_seed(seed: int, trial: int) -> int:
    """Return the sampler's seed for a trial: digest(study seed, trial number) as 32 bits.

    A seed that is the same after every restart would propose the same candidates again; one that
    is drawn for each trial gives a resumed study the candidates of an uninterrupted one.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{trial}".encode()).digest()[:4], "big")


def _tpe(setup: Setup, seed: int) -> BaseSampler:
    """Tree-structured Parzen estimator, joint over parameters if the space is conditional.

    With several objectives: Ozaki et al., Multiobjective TPE, JAIR 2022. Over 300 trials of a
    conditional space with three objectives the joint, grouped form found as much hypervolume as
    the independent one (0.538 and 0.534) with fewer duplicates (4 and 8%) and at half the cost; on
    a space without conditions the independent form found more (0.498 and 0.467).
    """
    return TPESampler(seed=seed, multivariate=setup.conditional, group=setup.conditional)


SAMPLERS: dict[str, Callable[[Setup, int], BaseSampler]] = {
    "tpe": _tpe,
    "tpe_independent": lambda _, seed: TPESampler(seed=seed, multivariate=False),
    "nsga2": lambda _, seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    "nsga3": lambda _, seed: NSGAIIISampler(seed=seed, population_size=POPULATION),
    "random": lambda _, seed: RandomSampler(seed=seed),
    # One low-discrepancy sequence for all trials; Optuna stores how far it has come.
    "qmc": lambda setup, _: QMCSampler(
        seed=setup.seed, scramble=True, warn_independent_sampling=False
    ),
    "gp": lambda _, seed: GPSampler(seed=seed, warn_independent_sampling=False),
}
"""Name -> builder. `gp` takes seconds a trial and models only parameters that always exist."""


def check(name: str) -> None:
    """Refuse a sampler that cannot be built.

    Raises:
        InputError: naming what there is, or file and line.
    """
    if name not in SAMPLERS:
        _guest(name)


def make(name: str, setup: Setup, trial: int) -> BaseSampler:
    """Build the sampler that proposes one trial.

    `name` is a key of SAMPLERS, or `file.py:Class` for a subclass of Optuna's BaseSampler, which
    is called with `seed`.

    Raises:
        InputError: if there is no such sampler.
    """
    seed = derived_seed(setup.seed, trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name in SAMPLERS:
            return SAMPLERS[name](setup, seed)
        return _guest(name)(seed=seed)


def _guest(name: str) -> Callable[..., BaseSampler]:
    """Load a guest's sampler class."""
    path, colon, cls = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(
            f"search.sampler: no sampler '{name}'.{suggestion(name, SAMPLERS)} There are"
            f" {', '.join(SAMPLERS)}, or write file.py:Class."
        )
    found = getattr(load_module(Path(path)), cls, None)
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise InputError(f"{path}: no class '{cls}' derived from optuna.samplers.BaseSampler")
    return found


class Asker:
    """Asks Optuna for trials and tells it what came of them, over all runs of a study."""

    def __init__(self, store: Store, space: Space) -> None:
        self._store, self._space = store, space
        self._directions = {o.name: o.direction for o in space.objectives}
        self._setup = Setup(space.search.seed, any(hole.given for hole in space.holes))
        self._size = math.inf if space.continuous else space.size
        self._points: set[str] = set()
        """Points of the space that were drawn."""
        self._orphans: deque[Trial] = deque()
        """Trials that an earlier run left behind."""
        self._total = self._asked = 0

    def take_up(self, total: int, stored: Mapping[int, Evaluation]) -> int:
        """Open the study, and tell what an earlier run stored but did not come to tell.

        Returns how many trials the study will have: `total`, or as many as there are.
        """
        self._optuna = optuna.create_study(
            study_name=self._space.name,
            storage=self._store.optuna_storage(),
            sampler=self._sampler(0),
            directions=list(self._directions.values()),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._optuna.set_metric_names(list(self._directions))
        trials = self._optuna.get_trials(deepcopy=False)
        # A trial that somebody enqueued waits; it counts once it is asked for.
        self._asked = sum(t.state != TrialState.WAITING for t in trials)
        self._total = max(total, self._asked)
        for frozen in trials:
            if frozen.state.is_finished():
                self._points.add(_point(frozen.params))
            elif frozen.state == TrialState.RUNNING:
                trial = Trial(self._optuna, frozen._trial_id)
                if frozen.number in stored:
                    self.tell(trial, stored[frozen.number])
                else:
                    self._orphans.append(trial)
        return self._total

    @property
    def finished(self) -> str | None:
        """Why nothing more is asked for: all `trials` are, or the finite space is `exhausted`."""
        if self._orphans:
            return None
        if self._asked >= self._total:
            return "trials"
        return "exhausted" if len(self._points) >= self._size else None

    def next(self) -> Trial | None:
        """Take up a trial of an earlier run, or ask for a new one; None if there are enough."""
        if self._orphans:
            return self._orphans.popleft()
        if self.finished is not None:
            return None
        self._optuna.sampler = self._sampler(self._asked)
        self._asked += 1
        return self._optuna.ask()

    def draw(self, trial: Trial) -> Plain:
        """Fill the holes of the space; a trial of an earlier run keeps the values it had."""
        self._optuna.sampler = self._sampler(trial.number)
        plain = self._space.draw(trial)
        self._points.add(_point(trial.params))
        return plain

    def constrain(self, trial: Trial, violations: Mapping[str, float]) -> None:
        """Say by how much each requirement is broken, over 0, or met."""
        held = trial.constraints
        for name, value in violations.items():
            if name not in held:
                trial.set_constraint(name, value)

    def tell(self, trial: Trial, found: Evaluation) -> None:
        """Tell what came of a trial. Its attributes come first: a told trial is closed.

        A trial that is infeasible before it is trained has no values, so it is PRUNED; TPE knows it
        by its constraints. One that breaks a requirement of the trained model has values: it is
        COMPLETE, and its constraints, told here, keep every sampler from taking it for good.
        """
        trained = found.status != "failed" and found.values.keys() >= self._directions.keys()
        if trained:
            plain = self._store.architecture(found.study, found.trial)
            architecture = self._space.architecture(plain)
            self.constrain(trial, self._space.trained_violations(architecture, found.routing))
        known: dict[str, Any] = {
            "architecture": one_line(self._store.architecture(found.study, found.trial)),
            "fingerprint": found.fingerprint or None,
            "failure": found.failure["kind"] if found.failure else None,
            "params": found.cost.get("params"),
            "active_params": found.cost.get("active_params"),
            "seconds": found.seconds.get("total"),
            **{name: found.metrics.get(name) for name in ("val_loss", "lr", "copied_from")},
        }
        for name, value in known.items():
            if value is not None:
                trial.set_user_attr(name, value)
        if found.status == "failed":
            self._optuna.tell(trial, state=TrialState.FAIL)
        elif trained:
            self._optuna.tell(trial, [found.values[name] for name in self._directions])
        else:
            self._optuna.tell(trial, state=TrialState.PRUNED)

    def _sampler(self, trial: int) -> BaseSampler:
        return make(self._space.search.sampler, self._setup, trial)


def _point(params: Mapping[str, Any]) -> str:
    """Name a point of the space by its drawn values."""
    return repr(sorted(params.items()))
