"""A stored study, its front and its trials, as Python reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna

from moenas.errors import NotFoundError
from moenas.grammar import user_parts
from moenas.grammar.summary import one_line
from moenas.records import EndReason, Evaluation, Plain, StudyRecord, View
from moenas.report.seed_noise_text import seed_report
from moenas.store import attempts
from moenas.store.store import Store
from moenas.study import repairs

if TYPE_CHECKING:
    import pandas

    from moenas.model.architecture import Architecture

SHOWN_MEMBERS = 8
"""Trials that the text of a front names."""


@dataclass(frozen=True)
class Member:
    """One candidate that no other one beats in every objective."""

    trial: int
    values: dict[str, float]
    architecture: Plain
    seeds: int = 1
    """Seeds that it was trained with; see `search.replicates`."""
    means: dict[str, float] | None = None
    """Objective -> mean over the seeds; None if no member has replicates."""
    half_widths: dict[str, float] | None = None
    """Objective -> half of the 95 % interval of the mean."""
    probability: float | None = None
    """That no other trial dominates it; see `predict.seed_noise`."""


@dataclass(frozen=True)
class Front:
    """The non-dominated candidates of a study, best first by the first objective."""

    members: tuple[Member, ...]
    directions: dict[str, str]
    hypervolume: float | None
    """Volume of objective space that the front dominates, up to the reference point."""
    reference_point: dict[str, float]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    def __repr__(self) -> str:
        volume = "none" if self.hypervolume is None else f"{self.hypervolume:.6g}"
        trials = [member.trial for member in self.members[:SHOWN_MEMBERS]]
        more = ", ..." if len(self.members) > SHOWN_MEMBERS else ""
        return (
            f"Front({len(self.members)} members: {', '.join(map(str, trials))}{more};"
            f" {', '.join(self.directions)}; hypervolume {volume})"
        )

    def dataframe(self) -> pandas.DataFrame:
        """Return a row for each member: trial, values, the architecture in one line."""
        import pandas

        rows = [
            {"trial": m.trial, **m.values, "architecture": one_line(m.architecture)}
            for m in self.members
        ]
        return pandas.DataFrame(rows, columns=["trial", *self.directions, "architecture"])

    def _repr_html_(self) -> str:
        return str(self.dataframe().to_html(index=False))


class Study:
    """One study in a store; everything is read when it is asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {self.store.place!r})"

    def _repr_html_(self) -> str:
        done, total = self.store.count(self.name), self.record.trials
        return f"<h4>{self.name}: {done} of {total} trials</h4>{self.front()._repr_html_()}"

    @property
    def record(self) -> StudyRecord:
        """What was stored when the study began."""
        return self.store.study(self.name)

    @property
    def changes(self) -> list[Plain]:
        """What was accepted after the start, in order: {changed_at, what, before, after}."""
        return self.store.read(self.name, lambda c: repairs.changes(c, self.name))

    @property
    def view(self) -> View:
        """Everything of the study at once."""
        return self.store.view(self.name)

    @property
    def finished(self) -> EndReason | None:
        """Why the study is over; None if it is not.

        `trials`: all are evaluated; `exhausted`: every point of a finite space was drawn;
        `sampler`: the sampler stopped it; `draws`: too many draws in a row gave no new candidate;
        `wall_time`, `train_flops`, `train_tokens` and `plateau`: that rule of `search.stop`.
        """
        ended = self.store.ended(self.name)
        if ended is None and attempts.evaluated(self.store, self.name) >= self.record.trials:
            return "trials"  # it ended under a version that did not store the reason
        return ended

    @property
    def optuna(self) -> optuna.Study:
        """The Optuna study behind it."""
        return optuna.load_study(study_name=self.name, storage=self.store.optuna_storage())

    def evaluation(self, trial: int) -> Evaluation:
        """Return what came of a trial.

        Raises:
            NotFoundError: if the trial does not exist or is not finished.
        """
        found = self.store.evaluation(self.name, trial)
        if found is None:
            raise NotFoundError(f"study '{self.name}' has no finished trial {trial}")
        return found

    def architecture(self, trial: int, *, allow_code: bool = False) -> Architecture:
        """Return the architecture of a trial.

        With `allow_code` the Python files that the database holds for the study are run.

        Raises:
            InputError: if the architecture needs such a file, which is neither allowed nor here.
        """
        from moenas.model.architecture import Architecture

        user_parts.load_stored(self.record.space, allow_code=allow_code)
        return Architecture.parse(self.store.architecture(self.name, trial))

    def front(self) -> Front:
        """Return the Pareto front."""
        view = self.store.front_view(self.name)
        names = view.study.directions
        seeds = seed_report(self.store, self.name) or {"members": []}
        known = {member["trial"]: member for member in seeds["members"]}
        members = tuple(
            Member(
                e.trial,
                {name: e.values[name] for name in names},
                view.architectures[e.trial],
                **_seed_fields(known.get(e.trial)),
            )
            for e in view.members
        )
        return Front(members, names, view.summary.hypervolume, view.study.reference_point)

    def dataframe(self) -> pandas.DataFrame:
        """Return a row for each finished trial: state, values, parameters, cost, failure, seconds.

        Columns of the values are the objectives' names; drawn parameters have the prefix
        `params.`, exact costs `cost.`.
        """
        import pandas

        names = self.record.directions
        drawn = {t.number: t.params for t in self.optuna.get_trials(deepcopy=False)}
        rows = [
            {
                "trial": e.trial,
                "state": e.status,
                **{name: e.values.get(name) for name in names},
                **{f"cost.{name}": value for name, value in e.cost.items()},
                "failure": e.failure.kind if e.failure else None,
                "seconds": e.seconds.get("total"),
                **{f"params.{name}": value for name, value in drawn.get(e.trial, {}).items()},
            }
            for e in self.store.evaluations(self.name)
        ]
        return pandas.DataFrame(rows)


def _seed_fields(found: Plain | None) -> Plain:
    """Return the fields of a member of the front that its replicates give."""
    if found is None:
        return {}
    values = found["values"].items()
    return {
        "seeds": found["seeds"],
        "means": {name: value["mean"] for name, value in values},
        "half_widths": {name: value["half_width"] for name, value in values},
        "probability": found["probability"],
    }


def load_study(name: str, storage: str | None = None) -> Study:
    """Return a stored study.

    Raises:
        NotFoundError: if there is none of that name.
    """
    store = Store.open(storage)
    store.study(name)
    return Study(store, name)
