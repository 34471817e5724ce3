"""How unevenly the experts are used in validation: MaxVio, the mean over the MoE layers.

MaxVio = max_i load_i / mean load - 1 (arXiv 2408.15664, eq. 4): 0 when all experts get the
same number of tokens, E / top_k - 1 when the same top_k of E experts get all. 0 for a model
without MoE layers.
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
    """Return the mean MaxVio, and the MaxVio of each layer."""
    layers = {str(row["layer"]): float(row["max_vio"]) for row in subject.training.routing}
    return Measurement(fmean(layers.values()) if layers else 0.0, {"max_vio": layers})
