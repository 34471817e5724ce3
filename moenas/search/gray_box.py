"""The gray-box sampler: exact costs, surrogates for what is measured, expected improvement."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr

from moenas import pareto
from moenas.predict.features import Encoder, Features, features
from moenas.search.improvement import expected_improvement
from moenas.search.neighbours import Point, held_point, neighbour, point
from moenas.search.rungs import Estimate, Rungs

if TYPE_CHECKING:
    from moenas.predict.surrogate import Surrogate
    from moenas.space.space import Space

Array = NDArray[np.float64]

INITIAL = 10
"""Evaluated trials before the first fit of a surrogate. Until then every second one is random."""
DRAWN = 1008
"""Random draws of a pool."""
FEASIBLE = 64
"""Feasible points among them below which draws go on, up to 20 times as many."""
KEPT_FOR = 16
"""Trials for which a random point of a pool is kept. So all asks draw equally many points."""
MUTATIONS = 200
"""Mutations of front members in a pool."""
SAMPLES = 16
"""Joint samples of the predicted objectives beside the first one."""
OF_THE_MODEL = (
    "diverged", "acausal", "collapsed", "timeout", "out_of_memory", "crashed", "error",
)  # fmt: skip
"""Kinds of failure that similar architectures may end with, too."""
FEASIBILITY = -1
"""The column of the surrogate that predicts whether a point is feasible."""
MARGIN = 0.05
"""Share of the range of an objective by which the reference point lies beyond the worst value."""


@dataclass(frozen=True)
class Described:
    """A point with what follows from its architecture alone."""

    point: Point
    fingerprint: str
    """The fingerprint of the architecture."""
    features: Features
    exact: dict[str, float]
    """Objective -> value, of the objectives that need no measurement."""


@dataclass(frozen=True)
class Evaluated:
    """A trial with its values."""

    described: Described
    values: list[float]
    """In the order of the objectives. At a rung the loss is an estimate, and others may be NaN."""
    variance: float = 0.0
    """Variance of the estimate of the loss; 0 of a complete trial."""
    feasible: bool = True
    """Whether the trained model meets all requirements."""


class GrayBox:
    """Proposes the points of one study.

    Objectives that follow from the architecture are computed for each point of a pool. A surrogate
    for each of the others is fitted to the evaluated trials. The point with the largest expected
    improvement of the hypervolume is proposed. Running trials count with their predicted values.
    Before INITIAL trials are evaluated, the surrogates have fixed hyperparameters. Their proposals
    have good exact objectives and new features. Every second trial is drawn at random then, because
    the loss may depend on an exact objective in a way that no trial has shown yet.

    The improvement is multiplied by the probability that the candidate is feasible (Gardner et al.,
    ICML 2014). This begins once a model has failed by its architecture, or has broken a requirement
    that is checked after the draw.

    With early stopping, candidates at a rung count with the loss that is expected of them at the
    end. `rungs` are those of the study.
    """

    def __init__(self, space: Space, rungs: Rungs | None = None) -> None:
        self.rungs = Rungs() if rungs is None else rungs
        self._space, self._seed = space, space.search.seed
        self._objectives = space.objectives
        self._signs = np.array([1 if o.direction == "minimize" else -1 for o in space.objectives])
        self._of_trials: dict[int, Described | None] = {}
        self._random: dict[int, list[Described]] = {}
        """Number of a trial -> the random points that enter the pool with it."""
        self._known: dict[str, tuple[Features, dict[str, float]]] = {}
        self._fitted: dict[int, tuple[int, Surrogate]] = {}

    def propose(self, number: int, trials: Iterable[FrozenTrial]) -> dict[str, Any] | None:
        """Return the parameters of trial `number`, or None if a random draw will do.

        A random draw will do for every second trial while fewer than INITIAL are evaluated, and if
        the pool holds only architectures that a trial had. The result depends on the trials and the
        seed alone, so a resumed study goes on as an uninterrupted one does.
        """
        complete, estimated, running = list[Evaluated](), list[Evaluated](), list[Described]()
        outcomes = list[tuple[Described, bool]]()
        seen, estimates = set[str](), self.rungs.estimates()
        # In the order in which they ended, which a run of several workers has too.
        for trial in sorted(trials, key=_ended):
            described = None if trial.number == number else self._described(trial)
            if described is None:
                continue
            seen.add(described.fingerprint)
            if _is_unusable(trial):
                outcomes.append((described, False))
            if trial.state == TrialState.COMPLETE:
                feasible = not _is_infeasible(trial)
                complete.append(Evaluated(described, trial.values, feasible=feasible))
                outcomes += [(described, True)] if feasible else []
            elif trial.state in (TrialState.RUNNING, TrialState.PRUNED):
                evaluated = self._estimated(described, estimates.get(trial.number))
                if evaluated is not None:
                    estimated.append(evaluated)
                    if trial.state == TrialState.PRUNED:
                        outcomes.append((described, True))
                elif trial.state == TrialState.RUNNING:
                    running.append(described)
        known = [*complete, *estimated]
        if len(known) < INITIAL and number % 2 == 0:
            return None
        if not self._encoder.names:
            return None
        losses = self._losses(known)
        feasible_rows = np.array([evaluated.feasible for evaluated in known], dtype=np.bool_)
        candidates = np.concatenate([feasible_rows, np.ones(len(running), dtype=np.bool_)])
        whole = np.flatnonzero(feasible_rows & ~np.isnan(losses).any(axis=1))
        front = whole[pareto.non_dominated(losses[whole], ["minimize"] * losses.shape[1])]
        pool = self._pool(number, [known[i].described for i in front], seen)
        if not pool:
            return None
        means, deviations = self._predict(known, losses, len(complete), running, pool)
        n_trials = len(known) + len(running)
        may_be_members = means[:n_trials][candidates]
        gains = _improvements(may_be_members, means[n_trials:], deviations[n_trials:])
        if not all(usable for _, usable in outcomes):
            with np.errstate(divide="ignore"):
                gains = np.log(gains) + self._log_feasibility(outcomes, pool)
        return pool[int(np.argmax(gains))].point.params

    def _estimated(self, described: Described, estimate: Estimate | None) -> Evaluated | None:
        """Return a candidate with what its rung says of the objectives; None if it says nothing."""
        names = [objective.name for objective in self._objectives]
        if estimate is None or "val_loss" not in names:
            return None
        values = {**described.exact, **estimate.values}
        return Evaluated(described, [values.get(n, np.nan) for n in names], estimate.variance)

    def _losses(self, known: Sequence[Evaluated]) -> Array:
        """Return the values of all objectives (N, M), to be minimised."""
        shape = len(known), len(self._objectives)
        losses: Array = np.array([each.values for each in known]).reshape(shape) * self._signs
        return losses

    # --- predictions ---------------------------------------------------------------------------

    def _predict(
        self,
        known: Sequence[Evaluated],
        losses: Array,
        n_complete: int,
        running: Sequence[Described],
        pool: Sequence[Described],
    ) -> tuple[Array, Array]:
        """Predict the values of all points from the values (N, M) of the known trials, minimised.

        The first `n_complete` of them are complete. Returns means and deviations (P, M) of known
        trials, running trials and the pool, in this order.
        """
        points = [*(evaluated.described for evaluated in known), *running, *pool]
        x = self._encoder.encode([p.features for p in points])
        rows = [[p.exact.get(o.name, np.nan) for o in self._objectives] for p in points]
        means = np.array(rows, dtype=np.float64) * self._signs
        deviations = np.zeros_like(means)
        tried = len(known) + len(running)
        for column in np.flatnonzero(np.isnan(means).any(axis=0)):
            there = np.flatnonzero(~np.isnan(losses[:, column]))
            variances = np.zeros(tried)
            if self._objectives[column].name == "val_loss":
                variances[: len(known)] = [evaluated.variance for evaluated in known]
            fitted = self._surrogate(
                int(column), x[there], losses[there, column], variances[there], n_complete
            )
            means[:tried, column], _ = fitted.predict(x[:tried])
            # A trial without a value counts as one that came out as predicted (the kriging believer
            # of Ginsbourger et al., 2010): the deviation falls around it, the mean stays.
            believed = means[:tried, column].copy()
            believed[there] = losses[there, column]
            believer = fitted.given(x[:tried], believed, variances)
            means[tried:, column], deviations[tried:, column] = believer.predict(x[tried:])
        return means, deviations

    def _log_feasibility(
        self, tried: Sequence[tuple[Described, bool]], pool: Sequence[Described]
    ) -> Array:
        """Return the log probability (P,) that a point neither fails nor breaks a requirement.

        `tried` says this of trials, in the order in which they ended. A process predicts -1 where
        it is so and 1 where it is not. The probability is that of a value below 0 (least-squares
        classification; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
        section 6.5).
        """
        x = self._encoder.encode([p.features for p in (*(one for one, _ in tried), *pool)])
        labels = np.array([-1.0 if usable else 1.0 for _, usable in tried])
        n = len(tried)
        process = self._surrogate(FEASIBILITY, x[:n], labels, np.zeros(n), n)
        mean, deviation = process.predict(x[n:])
        log_probability: Array = log_ndtr(-mean / np.hypot(deviation, process.noise))
        return log_probability

    @cached_property
    def _encoder(self) -> Encoder:
        """The columns of features; they stay the same for the whole study."""
        return Encoder([p.features for p in self._random_points(0)])

    def _surrogate(
        self, column: int, x: Array, losses: Array, variances: Array, n_complete: int
    ) -> Surrogate:
        """Return the surrogate of a column given complete trials, and estimated ones after.

        Hyperparameters are fitted again when the complete trials have grown by a tenth, to the
        trials that were there then, so that a resumed study has the same ones. While too few are
        complete, they are fitted to the estimated ones too.
        """
        from moenas.predict.surrogate import Surrogate

        if len(x) < INITIAL:
            return Surrogate.unfitted(x, losses)
        if n_complete < INITIAL:
            return Surrogate(x, losses).given(x, losses, variances)
        n_fitted = INITIAL
        while n_fitted + max(1, n_fitted // 10) <= n_complete:
            n_fitted += max(1, n_fitted // 10)
        if column == FEASIBILITY and len(np.unique(losses[:n_fitted])) == 1:
            return Surrogate.unfitted(x, losses)  # one label says nothing of the length scales
        if self._fitted.get(column, (0, None))[0] != n_fitted:
            self._fitted[column] = n_fitted, Surrogate(x[:n_fitted], losses[:n_fitted])
        return self._fitted[column][1].given(x, losses, variances)

    # --- points --------------------------------------------------------------------------------

    def _described(self, trial: FrozenTrial) -> Described | None:
        """Return the point of a trial; None if it is infeasible or has no parameters yet."""
        if trial.number not in self._of_trials and trial.params:
            held = held_point(self._space, trial.params)
            self._of_trials[trial.number] = None if held is None else self._describe(held)
        return self._of_trials.get(trial.number)

    def _describe(self, candidate: Point) -> Described:
        fingerprint = candidate.architecture.fingerprint
        if fingerprint not in self._known:
            exact = {o.name: o.exact_value(candidate.cost) for o in self._objectives}
            values = {name: value for name, value in exact.items() if value is not None}
            self._known[fingerprint] = features(candidate.architecture, candidate.cost), values
        # Points of one architecture may have other parameters, so each keeps its own.
        return Described(candidate, fingerprint, *self._known[fingerprint])

    def _pool(self, number: int, front: Sequence[Described], seen: set[str]) -> list[Described]:
        """Return points of architectures that no trial had: random ones, mutations of the front."""
        by_fingerprint = {p.fingerprint: p for p in self._random_points(number)}
        draw = random.Random(f"{self._seed}:{number}:mutations")
        for i in range(MUTATIONS if front else 0):
            parent = front[i % len(front)].point.params
            if (mutated := neighbour(self._space, parent, draw.getrandbits(48))) is not None:
                described = self._describe(mutated)
                by_fingerprint.setdefault(described.fingerprint, described)
        return [point for fingerprint, point in by_fingerprint.items() if fingerprint not in seen]

    def _random_points(self, number: int) -> list[Described]:
        """Return the random points of a pool; each trial replaces an equal share of them."""
        shares = range(number - KEPT_FOR + 1, number + 1)
        self._random = {n: self._random.get(n) or self._drawn(n) for n in shares}
        return [described for n in shares for described in self._random[n]]

    def _drawn(self, number: int) -> list[Described]:
        """Draw the random points that enter the pool with a trial."""
        draw = random.Random(f"{self._seed}:{number}:points")
        described = list[Described]()
        for i in range(20 * DRAWN // KEPT_FOR):
            if i >= DRAWN // KEPT_FOR and len(described) >= FEASIBLE // KEPT_FOR:
                break
            if (drawn := point(self._space, draw.getrandbits(48))) is not None:
                described.append(self._describe(drawn))
        return described


def _improvements(trials: Array, pool: Array, spread: Array) -> Array:
    """Return the expected improvement of the hypervolume by each point of the pool.

    `trials` (N, M) and `pool` (P, M) are means, `spread` (P, M) the deviations of the pool. The
    front is that of predicted means, so one lucky seed does not raise it.
    """
    means = np.concatenate([trials, pool])
    worst, best = means.max(axis=0), means.min(axis=0)
    # Where all means are equal, the unit of the objective is that of its deviations.
    unit = np.where(spread.any(axis=0), spread.max(axis=0), 1.0)
    reference = worst + MARGIN * np.where(worst > best, worst - best, unit)
    # The first predicted objective is integrated, the others that are predicted are sampled.
    learned = np.flatnonzero(spread.any(axis=0))
    first, sampled = int(learned[0]) if len(learned) else 0, learned[1:]
    others = [i for i in range(pool.shape[1]) if i != first]
    n_samples = SAMPLES if len(sampled) else 1
    known = np.tile(pool, (n_samples, 1, 1))  # (samples, pool, objectives)
    noise = np.random.default_rng(0).standard_normal((n_samples, 1, len(sampled)))
    known[:, :, sampled] += noise * spread[:, sampled]
    gains = expected_improvement(
        np.tile(pool[:, first], n_samples),
        np.tile(spread[:, first], n_samples),
        known[:, :, others].reshape(n_samples * len(pool), len(others)),
        trials[:, [first, *others]],
        reference[[first, *others]],
    )
    mean: Array = gains.reshape(n_samples, len(pool)).mean(axis=0)
    return mean


def _ended(trial: FrozenTrial) -> tuple[bool, float, int]:
    """Order trials by their end; those that run come last."""
    ended = trial.datetime_complete
    return ended is None, 0.0 if ended is None else ended.timestamp(), trial.number


def _is_unusable(trial: FrozenTrial) -> bool:
    """Whether a trial ended without a candidate for the front, by its architecture."""
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("failure") in OF_THE_MODEL
    return trial.state.is_finished() and _is_infeasible(trial)


def _is_infeasible(trial: FrozenTrial) -> bool:
    return any(amount > 0 for amount in trial.constraints.values())
