"""Trainable parameters of the model, all experts included.

By exact arithmetic, before anything is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "parameters"
needs = "cost"
exact = "params"


def measure(subject: Subject) -> float:
    """Return the number of parameters."""
    return subject.cost.params
