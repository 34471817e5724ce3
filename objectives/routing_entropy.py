"""How evenly the experts are used in validation: entropy of the load, the mean over the MoE layers.

The entropy of the shares of the experts over the logarithm of their number: 1 when all get the
same, 0 when one gets everything. 1 for a model without MoE layers.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "maximize"
unit = ""
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the mean entropy, and the entropy of each layer."""
    layers = {str(row["layer"]): float(row["entropy"]) for row in subject.training.routing}
    return Measurement(fmean(layers.values()) if layers else 1.0, {"entropy": layers})
