"""Asks Optuna for trials and tells it their outcome, over all runs of a study."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from moenas.errors import InputError, MoenasError, StorageLostError
from moenas.failures import error_line
from moenas.grammar.summary import one_line
from moenas.records import Evaluation, Plain
from moenas.search import start_points
from moenas.search.points import Points
from moenas.search.proposals import Proposals
from moenas.search.start_points import StartPoint
from moenas.store.optuna_rows import CONSTRAINTS
from moenas.store.optuna_storage import TrialChanges
from moenas.store.store import Store

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from moenas.search.rungs import Rungs
    from moenas.space.space import Space
    from moenas.store.optuna_storage import Param, Storage

log = logging.getLogger(__name__)

OF_THE_SAMPLER = (Exception, SystemExit)
"""What a user's sampler may raise; `sys.exit` in it must not end a run as if all was well."""
TOLERANCE = 1e-8
"""How far a value may lie from the grid of its distribution, in steps."""


class ToldElsewhereError(Exception):
    """Another program has finished a trial of this study."""


class SamplerFailedError(Exception):
    """A sampler raised, so that a trial has no parameters."""

    def __init__(self, trial: Trial, message: str) -> None:
        super().__init__(message)
        self.trial = trial


class ParametersError(Exception):
    """The parameters of a trial, such as an enqueued one, are not a point of the space."""


class _AskAndTell(optuna.Study):
    """Optuna's study outside of `optimize`, which alone allows a sampler to call `stop`."""

    stopped = False
    rows: Storage
    """The storage below Optuna's cache."""

    def stop(self) -> None:
        """Note that the sampler proposes nothing more."""
        self.stopped = True

    def _pop_waiting_trial_id(self) -> int | None:
        """Return the next enqueued trial, which now runs; Optuna's own reads all that run."""
        for trial_id in self.rows.waiting_trials(self._study_id):
            with suppress(UpdateFinishedTrialError):
                if self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                    return trial_id
        return None


class _ParamBuffer:
    """Stands for the storage of a trial during its draw, and collects the parameters.

    Optuna stores each parameter in a transaction of its own.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial, self._storage = trial, trial.storage
        self.params: list[Param] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_param(
        self, trial_id: int, name: str, value: float, distribution: BaseDistribution
    ) -> None:
        """Note a parameter."""
        self.params.append((name, value, distribution))

    def end(self) -> list[Param]:
        """Give the trial its storage back; return the parameters."""
        self._trial.storage = self._storage
        return self.params


def outcome(evaluation: Evaluation, names: Sequence[str]) -> tuple[TrialState, list[float] | None]:
    """Return the state and the values that Optuna's trial has for an evaluation of ours.

    A trial that early stopping has stopped is PRUNED. It gets no intermediate values: of a trial
    that has one, TPE asks the direction of a study of several objectives, which raises. A trial
    that is infeasible before it is trained has no values, so it is PRUNED; TPE knows it by its
    constraints. One that breaks a requirement of the trained model has values: it is COMPLETE,
    and its constraints keep every sampler from taking it for a good one.
    """
    if evaluation.status == "failed":
        return TrialState.FAIL, None
    if evaluation.status == "stopped":
        return TrialState.PRUNED, None
    values = [evaluation.values.get(name, math.nan) for name in names]
    if any(math.isnan(value) for value in values):  # Optuna takes no NaN
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, values


class OptunaTrials:
    """Optuna's side of one study."""

    def __init__(self, store: Store, space: Space, rungs: Rungs | None = None) -> None:
        self._store, self._space = store, space
        self._names = [o.name for o in space.objectives]
        self.points = Points(space)
        self._proposals = Proposals(space, self.points, rungs)
        self._interrupted: deque[int] = deque()
        """Ids of trials that an earlier run left without an outcome."""
        self._active: set[int] = set()
        """Numbers of the trials that are asked and not told."""
        self._unwritten: dict[int, list[Param]] = {}
        """Id of a trial -> its parameters, which go with the next change of the trial."""
        self._asked = 0

    def open(self) -> None:
        """Open Optuna's study, or make it.

        Raises:
            InputError: if Optuna's tables hold a study of that name that has other objectives.
        """
        directions = [o.direction for o in self._space.objectives]
        storage = cast("Storage", self._store.optuna_storage())
        made = optuna.create_study(
            study_name=self._space.name,
            storage=storage,
            directions=list(directions),
            load_if_exists=True,
        )
        there = [direction.name.lower() for direction in made.directions]
        if there != directions:
            raise InputError(
                f"study '{self._space.name}': Optuna's tables in {self._store.place} hold a study"
                f" of that name with the directions {', '.join(there)}, not"
                f" {', '.join(directions)}; give the space another `name`"
            )
        self._optuna = _AskAndTell(
            study_name=self._space.name, storage=storage, sampler=RandomSampler()
        )
        self._optuna.rows = storage
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._optuna.set_metric_names(self._names)

    @property
    def study(self) -> optuna.Study:
        """Optuna's study."""
        return self._optuna

    def frozen(self) -> list[FrozenTrial]:
        """Return Optuna's trials in order of their numbers."""
        return self._optuna.get_trials(deepcopy=False)

    def load(self, stored: Mapping[int, Evaluation]) -> None:
        """Take in the trials as they are, after both stores were made to agree."""
        trials = self.frozen()
        # A trial that somebody enqueued waits; it counts once it is asked for.
        self._asked = sum(t.state != TrialState.WAITING for t in trials)
        for frozen in trials:
            if frozen.state == TrialState.RUNNING:
                self._interrupted.append(frozen._trial_id)
            elif frozen.number in stored and (
                stored[frozen.number].fingerprint or stored[frozen.number].status == "infeasible"
            ):
                self.points.add(frozen.params)

    def enqueue(self, points: Sequence[StartPoint]) -> None:
        """Let architectures be evaluated next, each once however often this is called."""
        start_points.enqueue(self._optuna, points)

    @property
    def interrupted(self) -> int:
        """How many trials of earlier runs wait for their outcome."""
        return len(self._interrupted)

    @property
    def stopped(self) -> bool:
        """Whether the sampler has ended the study."""
        return self._optuna.stopped

    @property
    def exhausted(self) -> bool:
        """Whether every point of a finite space was drawn, and nothing is enqueued."""
        return self.points.exhausted and not self._optuna.get_trials(
            deepcopy=False, states=(TrialState.WAITING,)
        )

    def ask(self, fruitless: int) -> Trial:
        """Return a trial that an earlier run left, or ask for a new one.

        After some draws in a row without a new candidate, a point of a finite space that was not
        drawn is proposed in place of the sampler's.

        Raises:
            SamplerFailedError: if the sampler raised; it carries the trial.
        """
        number = self._asked
        try:
            if self._interrupted:
                trial_id = self._interrupted.popleft()
                left = self._optuna._storage.get_trial(trial_id)
                number = left.number
                drawn = left.params
                self._optuna.sampler = (
                    self._proposals.sampler(number) if drawn else self._proposed(number, fruitless)
                )
                trial = Trial(self._optuna, trial_id)
            else:
                self._optuna.sampler = self._proposed(number, fruitless)
                self._asked += 1
                trial = self._optuna.ask()
                if trial.number != number:  # an enqueued trial has an earlier number
                    self._optuna.sampler = self._proposals.sampler(trial.number)
        except (MoenasError, StorageInternalError):
            raise
        except OF_THE_SAMPLER as error:
            raise SamplerFailedError(self._left_behind(), error_line(error)) from error
        self._active.add(trial.number)
        return trial

    def draw(self, trial: Trial) -> Plain:
        """Fill the holes of the space; a trial of an earlier run keeps the values it had.

        The values are stored by `set_constraints` or `tell`, which must follow.

        Raises:
            ParametersError: if a value that the trial holds is not one of the space.
            SamplerFailedError: if the sampler raised.
        """
        held = dict(trial.params)
        fixed = trial._fixed_params
        try:
            with warnings.catch_warnings():
                # Optuna warns of a fixed value out of range, and takes it; we refuse it below.
                warnings.simplefilter("ignore", UserWarning)
                answers = self.points.held(held, trial) if held else None
                with self._collecting(trial):
                    plain = self._space.draw(answers or trial)
        except (MoenasError, StorageInternalError):
            raise
        except OF_THE_SAMPLER as error:
            if held or fixed:
                raise ParametersError(error_line(error)) from error
            raise SamplerFailedError(trial, error_line(error)) from error
        params = trial.params  # a deep copy at each access
        for name, distribution in trial.distributions.items():
            if not _contains(distribution, params[name]):
                raise ParametersError(f"{name} = {params[name]!r} is not in {distribution}")
        self.points.add(answers.answers if answers else params)
        return plain

    @contextmanager
    def _collecting(self, trial: Trial) -> Iterator[None]:
        """Collect the parameters that are drawn meanwhile."""
        buffer = _ParamBuffer(trial)
        trial.storage = cast(Any, buffer)
        try:
            yield
        finally:
            self._unwritten[trial._trial_id] = buffer.end()

    def set_constraints(self, trial: Trial, violations: Mapping[str, float]) -> None:
        """Store the parameters, and by how much each requirement is broken, over 0, or met.

        Raises:
            ParametersError: if a value that was fixed beforehand does not fit the other trials.
            SamplerFailedError: if another does not, or another program has finished the trial.
        """
        params = self._unwritten.pop(trial._trial_id, [])
        system = self._add_attributes(trial, {}, violations)
        if not (params or system):
            return
        try:
            self._optuna.rows.write_trial(trial._trial_id, TrialChanges(params, {}, system))
        except (ValueError, UpdateFinishedTrialError) as error:
            if trial._fixed_params:
                raise ParametersError(error_line(error)) from error
            raise SamplerFailedError(trial, error_line(error)) from error

    def _add_attributes(
        self, trial: Trial, user: Mapping[str, Any], violations: Mapping[str, float]
    ) -> dict[str, float]:
        """Give attributes to a trial in memory; return the constraints that it did not have.

        A constraint of the trained model is known before the training where a prediction has
        decided it. The measured one takes its place.
        """
        known = trial._cached_frozen_trial
        held = known.constraints
        system = {
            f"{CONSTRAINTS}:{name}": float(value)
            for name, value in violations.items()
            if held.get(name) != float(value)
        }
        known.user_attrs.update(user)
        known.system_attrs.update(system)
        return system

    def tell(
        self,
        trial: Trial,
        evaluation: Evaluation,
        violations: Mapping[str, float] | None = None,
        summary: str = "",
    ) -> None:
        """Tell the outcome of a trial, whose architecture is `summary` in one line.

        `violations` are those of the requirements that are decided after training.

        Raises:
            ToldElsewhereError: if another program has told the trial.
            StorageLostError: if another program has deleted it.
        """
        number = evaluation.trial
        self._active.discard(number)
        state, values = outcome(evaluation, self._names)
        user = _description(evaluation, summary)
        system = self._add_attributes(trial, user, violations or {})
        self._after_trial(trial, state, values)
        params = self._unwritten.pop(trial._trial_id, [])
        changes = TrialChanges(params, user, system, state, values)
        try:
            self._optuna.rows.write_trial(trial._trial_id, changes)
        except KeyError:
            raise StorageLostError(
                f"study '{self._space.name}': another program has deleted it from Optuna's tables;"
                " run the same command again to restore it from ours"
            ) from None
        except UpdateFinishedTrialError:
            told = self._optuna._storage.get_trial(trial._trial_id)
            raise ToldElsewhereError(f"trial {number} is {told.state.name} already") from None

    def _after_trial(self, trial: Trial, state: TrialState, values: list[float] | None) -> None:
        """Let the sampler see a trial that ends, as `Study.tell` does before it stores the end.

        `Study.tell` reads the trial from the database once more; this driver is its only writer.
        """
        self._optuna.sampler = self._proposals.sampler(trial.number)
        self._optuna._thread_local.cached_all_trials = None
        try:
            frozen = trial._cached_frozen_trial
            self._optuna.sampler.after_trial(self._optuna, frozen, state, values)
        except (MoenasError, StorageInternalError):
            raise
        except OF_THE_SAMPLER as error:
            log.warning("the sampler fails after trial %d: %s", trial.number, error_line(error))

    def tell_stored(self, evaluation: Evaluation, violations: Mapping[str, float]) -> None:
        """Tell an evaluation that an earlier run stored and could not tell, as `tell` does.

        Raises:
            ToldElsewhereError: if the trial does not run.
        """
        storage, study_id = self._optuna._storage, self._optuna._study_id
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, evaluation.trial)
        self._optuna.sampler = RandomSampler()
        plain = self._store.architecture(evaluation.study, evaluation.trial)
        summary = one_line(plain) if plain else ""
        self.tell(Trial(self._optuna, trial_id), evaluation, violations, summary)

    def _proposed(self, number: int, fruitless: int) -> BaseSampler:
        """Return the sampler of a new trial."""
        return self._proposals.proposing(number, fruitless, self.frozen)

    def _left_behind(self) -> Trial:
        """Return the trial that was made before its sampler raised."""
        self._optuna.sampler = RandomSampler()
        running = self._optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        waiting = set(self._interrupted)
        left = [t for t in running if t.number not in self._active and t._trial_id not in waiting]
        trial = Trial(self._optuna, left[-1]._trial_id)
        self._active.add(trial.number)
        return trial


def _description(evaluation: Evaluation, summary: str) -> dict[str, Any]:
    """Return what the dashboard shows of a trial."""
    metrics = evaluation.metrics
    known: dict[str, Any] = {
        "architecture": summary or None,
        "fingerprint": evaluation.fingerprint or None,
        "failure": evaluation.failure.kind if evaluation.failure else None,
        "params": evaluation.cost.get("params"),
        "active_params": evaluation.cost.get("active_params"),
        "seconds": evaluation.seconds.get("total"),
        **{name: metrics.get(name) for name in ("val_loss", "lr", "copied_from")},
    }
    return {name: value for name, value in known.items() if value is not None}


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    """Say whether a value is one of a distribution; Optuna does not ask for a fixed one."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if not isinstance(distribution, IntDistribution | FloatDistribution):
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    if not distribution.low <= value <= distribution.high:
        return False
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    return abs(steps - round(steps)) <= TOLERANCE * max(1.0, abs(steps))
