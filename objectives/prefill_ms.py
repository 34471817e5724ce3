"""Time of one forward pass of the trained model over a prompt.

`measure.prefill_batch` prompts of `measure.prefill_tokens` tokens of real text, from an empty cache
to the logits; the trained router routes. The value is the median ratio to a fixed reference model,
timed in pairs, times the reference's time on this device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.evaluate.latency import candidate_latency
from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "ms"
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the time, with ratio, spread, n and the reference's time."""
    protocol = subject.protocol
    return candidate_latency(subject, "prefill", protocol.prefill_batch, protocol.prefill_tokens)
