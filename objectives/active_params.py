"""Parameters that one token passes through: top_k of the experts, one row of the embedding.

A table that is tied to the output head counts whole. By exact arithmetic, before anything is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "parameters"
needs = "cost"
exact = "active_params"


def measure(subject: Subject) -> float:
    """Return the number of parameters."""
    return subject.cost.active_params
