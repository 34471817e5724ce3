"""Forward operations per token: two for each multiply-add of every matrix product.

fvcore counts one pass over a sequence of `train.context` tokens; a large model is counted on the
meta device. Attention counts over the full square, element-wise work counts nothing, a training
step costs about three times as much. The count must equal the closed form `Cost.flops_per_token`:
where they differ, the candidate fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "FLOP/token"
needs = "model"
exact = "flops_per_token"


def measure(subject: Subject) -> Measurement:
    """Return the count, with the context and the multiply-adds of each operator."""
    return subject.flops()
