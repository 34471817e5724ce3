"""Share of the slots that find no room at an expert, the mean over the MoE layers.

A slot is one token at one of its experts. Counted on the text of validation at the capacity of
training; validation itself drops nothing. 0 without a capacity, and for a model without MoE layers.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = ""
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the mean share, and the share of each layer."""
    layers = {str(row["layer"]): float(row["dropped"]) for row in subject.training.routing}
    return Measurement(fmean(layers.values()) if layers else 0.0, {"dropped": layers})
