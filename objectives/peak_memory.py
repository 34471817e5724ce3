"""Peak memory of one training step: parameters, gradients, optimizer state and activations.

MiB (2^20 bytes) of live tensors at the worst moment of the second step, at the batch and context of
training. On a CPU it is the sum of the tensors' storages, the same on every machine; on CUDA it is
the allocator's peak. Scratch space inside one operator counts on CUDA alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "MiB"
needs = "model"


def measure(subject: Subject) -> Measurement:
    """Return the peak, with the step that it was measured in."""
    return subject.peak_memory()
