"""A trial inside the driver: its architecture and what it broke, from the draw to the commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moenas.errors import SpaceError
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
    plain: Plain
    """The canonical architecture, or the drawn fields if they do not go together."""
    architecture: Architecture | None = None
    fingerprint: str = ""
    cost: dict[str, int] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    """Requirement -> by how much it is broken, over 0, or met."""
    clash: str = ""
    """Why the drawn fields do not go together."""
    crashes: int = 0
    """How often its worker process died in this run."""
    fault_at: int = 0
    """Results that had come back in this run when it met a fault of the environment."""

    @classmethod
    def drawn(cls, trial: Trial, plain: Plain, space: Space) -> Candidate:
        """Build the candidate of a drawn point."""
        try:
            architecture = space.architecture(plain)
        except SpaceError as error:
            return cls(trial, plain, violations={VALID: 1.0}, clash=str(error))
        return cls(
            trial,
            architecture.plain(),
            architecture,
            architecture.fingerprint,
            space.cost(architecture).plain(),
            {VALID: 0.0, **space.violations(architecture)},
        )

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def broken(self) -> dict[str, float]:
        """The requirements that it breaks."""
        return {name: value for name, value in self.violations.items() if value > 0}

    def evaluation(self, study: str, attempt: int, status: Status, **known: Any) -> Evaluation:
        """Return an evaluation of which only the architecture and `known` are known."""
        return Evaluation(
            study=study,
            trial=self.number,
            attempt=attempt,
            status=status,
            fingerprint=self.fingerprint,
            cost=self.cost,
            **known,
        )
