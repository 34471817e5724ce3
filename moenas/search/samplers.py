"""The samplers by name: those of Optuna, the grid, and a class of the user's."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

from moenas.errors import InputError
from moenas.resources import load_module
from moenas.space.sections import unknown_sampler

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

    def seed_of(self, trial: int) -> int:
        """Return the seed of the sampler of one trial."""
        return derived_seed(self.seed, trial)


def derived_seed(seed: int, trial: int) -> int:
    """Return the sampler's seed for a trial: digest(study seed, trial number) as 32 bits.

    A seed that is the same after every restart would propose the same candidates again; one that
    is drawn for each trial gives a resumed study the candidates of an uninterrupted one.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{trial}".encode()).digest()[:4], "big")


class NumberedQMC(QMCSampler):
    """Optuna's quasi-Monte Carlo sampler, with the point that belongs to the number of a trial.

    Optuna's own takes the next point of a stored counter. A trial that is killed before its
    parameters are stored would then get another point, and its own would be missing.
    """

    def __init__(self, seed: int, trial: int) -> None:
        """Take the seed of the sequence, which all trials of a study share."""
        super().__init__(
            scramble=True,
            seed=seed,
            # Parameters that the first trial does not have are no part of the sequence.
            independent_sampler=RandomSampler(seed=derived_seed(seed, trial)),
            warn_independent_sampling=False,
        )
        self._trial = trial

    def _find_sample_id(self, *_: object) -> int:
        """Return the place in the sequence; the first trial of a study is an independent draw."""
        return max(0, self._trial - 1)


def _tpe(setup: Setup, trial: int) -> BaseSampler:
    """Tree-structured Parzen estimator, joint over parameters if the space is conditional.

    With several objectives: Ozaki et al., Multiobjective TPE, JAIR 2022. Over 300 trials of a
    conditional space with three objectives the joint, grouped form found as much hypervolume as
    the independent one (0.538 and 0.534) with fewer duplicates (4 and 8%) and at half the cost; on
    a space without conditions the independent form found more (0.498 and 0.467).
    """
    joint = setup.conditional
    return TPESampler(seed=setup.seed_of(trial), multivariate=joint, group=joint)


def _random(setup: Setup, trial: int) -> BaseSampler:
    return RandomSampler(seed=setup.seed_of(trial))


BUILDERS: dict[str, Callable[[Setup, int], BaseSampler]] = {
    "tpe": _tpe,
    "tpe_independent": lambda setup, trial: TPESampler(
        seed=setup.seed_of(trial), multivariate=False
    ),
    "nsga2": lambda setup, trial: NSGAIISampler(
        seed=setup.seed_of(trial), population_size=POPULATION
    ),
    "nsga3": lambda setup, trial: NSGAIIISampler(
        seed=setup.seed_of(trial), population_size=POPULATION
    ),
    "random": _random,
    "qmc": lambda setup, trial: NumberedQMC(setup.seed, trial),
    "gp": lambda setup, trial: GPSampler(
        seed=setup.seed_of(trial), warn_independent_sampling=False
    ),
    # Its points come from gray_box.GrayBox; the first of a study are random.
    "gray_box": _random,
    # Its points come from evolution.Evolution.
    "evolution": _random,
    # The points themselves come from points.Points; no parameter is left to this sampler.
    "grid": _random,
}
"""Name of `sections.SAMPLERS` -> builder, which is called with the number of the trial.

`gp` takes seconds a trial and models only parameters that always exist.
"""


def check(name: str) -> None:
    """Refuse a sampler that cannot be built.

    Raises:
        InputError: naming what there is, or file and line.
    """
    if name not in BUILDERS:
        _instance(name, 0)


def make(name: str, setup: Setup, trial: int) -> BaseSampler:
    """Build the sampler that proposes one trial.

    `name` is one of `sections.SAMPLERS`, or `file.py:Class` for a subclass of Optuna's
    BaseSampler. The class is called with `seed`.

    Raises:
        InputError: if there is no such sampler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name in BUILDERS:
            return BUILDERS[name](setup, trial)
        return _instance(name, setup.seed_of(trial))


def _instance(name: str, seed: int) -> BaseSampler:
    """Make a sampler of the user's class."""
    cls = _user_class(name)
    try:
        return cls(seed=seed)
    except (Exception, SystemExit) as error:
        path, _, called = name.rpartition(":")
        raise InputError(
            f"{path}: {called}(seed={seed}) raised {type(error).__name__}: {error}; it is called"
            " with a seed and must return a sampler"
        ) from error


def _user_class(name: str) -> Callable[..., BaseSampler]:
    """Load a user's sampler class."""
    path, colon, cls = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"search.sampler: {unknown_sampler(name)}.")
    sampler = getattr(load_module(Path(path)), cls, None)
    if not (isinstance(sampler, type) and issubclass(sampler, BaseSampler)):
        raise InputError(f"{path}: no class '{cls}' derived from optuna.samplers.BaseSampler")
    return sampler
