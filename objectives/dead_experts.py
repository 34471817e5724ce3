"""Experts that hardly any token of validation goes to, over all MoE layers.

Those with less than 1 % of the mean load of their layer. 0 for a model without MoE layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "experts"
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the number, and the number of each layer."""
    layers = {str(row["layer"]): int(row["dead"]) for row in subject.training.routing}
    return Measurement(sum(layers.values()), {"dead": layers})
