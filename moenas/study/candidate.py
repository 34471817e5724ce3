"""A trial inside the driver: its architecture and the requirements that it breaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moenas.errors import SpaceError
from moenas.grammar.sampling import RandomSuggest
from moenas.grammar.summary import one_line
from moenas.records import Evaluation, Plain, Status

if TYPE_CHECKING:
    from optuna.trial import Trial

    from moenas.model.architecture import Architecture
    from moenas.space.space import Space

VALID = "the architecture is valid"
"""The constraint that a draw breaks whose fields do not go together."""


@dataclass
class Candidate:
    """A trial between ask and tell."""

    trial: Trial
    architecture: Architecture | None = None
    """None before the draw, and where the drawn fields do not go together."""
    drawn: Plain = field(default_factory=dict)
    """The drawn fields."""
    cost: dict[str, int] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    """Requirement -> by how much it is broken, over 0, or met."""
    trained_violations: dict[str, float] = field(default_factory=dict)
    """The same of the requirements that are decided after training; empty before it."""
    invalid: str = ""
    """Why the drawn fields do not go together, or which cost the nearest width of a fit gives."""
    predicted: dict[str, float] = field(default_factory=dict)
    """Predicted latencies by which the candidate is refused before its training."""
    source: Evaluation | None = None
    """The evaluation of its model in another study that is reused, with the values that hold."""
    crashes: int = 0
    """How often its worker process died in this run."""

    @classmethod
    def from_draw(cls, trial: Trial, drawn: Plain, space: Space) -> Candidate:
        """Build the candidate of a drawn point."""
        try:
            architecture = space.architecture(drawn)
        except SpaceError as error:
            return cls(trial, drawn=drawn, violations={VALID: 1.0}, invalid=str(error))
        violations = {VALID: 0.0, **space.violations(architecture)}
        candidate = cls(trial, architecture, drawn, space.cost_record(architecture), violations)
        if space.fit is not None and violations[space.fit.text] > 0:
            candidate.invalid = space.missed_fit(RandomSuggest(0, trial.params))
        return candidate

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @cached_property
    def plain(self) -> Plain:
        """The canonical architecture, or the drawn fields if they do not go together."""
        return self.drawn if self.architecture is None else self.architecture.plain()

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the architecture; empty if there is none."""
        return "" if self.architecture is None else self.architecture.fingerprint

    @cached_property
    def summary(self) -> str:
        """The architecture in one line; empty before the draw."""
        return one_line(self.plain) if self.plain else ""

    @property
    def summary_with_source(self) -> str:
        """The architecture in one line, with the source of an evaluation that is reused."""
        if (source := self.source) is None:
            return self.summary
        return f"reused from trial {source.trial} of study '{source.study}' | {self.summary}"

    @property
    def broken(self) -> dict[str, float]:
        """The requirements that it breaks."""
        return {name: value for name, value in self.violations.items() if value > 0}

    def evaluation(self, study: str, attempt: int, status: Status, **known: Any) -> Evaluation:
        """Return an evaluation that holds the architecture's facts and the fields in `known`."""
        return Evaluation(
            study=study,
            trial=self.number,
            attempt=attempt,
            status=status,
            fingerprint=self.fingerprint,
            cost=self.cost,
            **known,
        )
