"""Time of one decoding step of the trained model: one new token for each sequence of a batch.

`measure.decode_batch` sequences, each with a key-value cache of `measure.decode_context` tokens of
real text; the trained router routes. The value is the median ratio to a fixed reference model,
timed in pairs, times the reference's time on this device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.evaluate.latency import candidate_latency
from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "ms/step"
needs = "training"


def measure(subject: Subject) -> Measurement:
    """Return the time, with ratio, spread, n and the reference's time."""
    protocol = subject.protocol
    return candidate_latency(subject, "decode", protocol.decode_batch, protocol.decode_context)
