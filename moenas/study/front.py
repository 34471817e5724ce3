"""The Pareto front of a study, as it was when it was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moenas.grammar.summary import counted, one_line
from moenas.records import Plain

if TYPE_CHECKING:
    import pandas

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
    """Objective -> mean over the further seeds, if there are two, else over all; None if no member
    has replicates."""
    half_widths: dict[str, float] | None = None
    """Objective -> half of the 95 % interval of the mean."""
    probability: float | None = None
    """That no other trial dominates it; see `predict.seed_noise`."""

    def __repr__(self) -> str:
        values = [f"{name}={value:.6g}" for name, value in self.values.items()]
        model = one_line(self.architecture) if self.architecture else "no architecture"
        seeds = [f"seeds={self.seeds}"] if self.seeds > 1 else []
        words = [f"trial={self.trial}", *values, f"architecture=<{model}>", *seeds]
        return f"Member({', '.join(words)})"


def seed_fields(report: Plain | None) -> Plain:
    """Return the fields of a member of the front that its replicates give."""
    if report is None:
        return {}
    values = report["values"].items()
    return {
        "seeds": report["seeds"],
        "means": {name: value["mean"] for name, value in values},
        "half_widths": {name: value["half_width"] for name, value in values},
        "probability": report["probability"],
    }


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
            f"Front({counted(len(self.members), 'member')}: {', '.join(map(str, trials))}{more};"
            f" {', '.join(self.directions)}; hypervolume {volume})"
        )

    @property
    def knee(self) -> Member:
        """The member with the smallest sum of scaled losses; see `moenas.pareto.knee`.

        Raises:
            InputError: if the front is empty.
        """
        from moenas import pareto

        values = [[member.values[name] for name in self.directions] for member in self.members]
        return self.members[pareto.knee(values, list(self.directions.values()))]

    def dataframe(self) -> pandas.DataFrame:
        """Return a row for each member: trial, values, the architecture in one line."""
        import pandas

        rows = [
            {"trial": m.trial, **m.values, "architecture": one_line(m.architecture)}
            for m in self.members
        ]
        return pandas.DataFrame(rows, columns=["trial", *self.directions, "architecture"])

    def _repr_html_(self) -> str:
        from moenas.report.front_drawing import front_svg

        points = [(member.trial, member.values) for member in self.members]
        return front_svg(points, list(self.directions)) + str(self.dataframe().to_html(index=False))
