"""Peak memory of one training step: parameters, gradients, optimizer state and activations.

MiB (2^20 bytes) of live tensors at the worst moment of the second step, at the batch and context of
training. On a CPU it is the sum of the tensors' storages, the same on every machine; on CUDA it is
the allocator's peak. Scratch space inside one operator counts on CUDA alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moenas.evaluate.training_peak import training_peak
from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject

direction = "minimize"
unit = "MiB"
needs = "model"

MIB = 2**20


def measure(subject: Subject) -> Measurement:
    """Return the peak, with the step that it was measured in."""
    recipe = subject.recipe
    peak = training_peak(subject, steps=2)  # optimizer state and gradients exist from the second on
    details = {
        "bytes": peak,
        "batch": recipe.batch,
        "context": recipe.context,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": subject.device.type,
    }
    return Measurement(peak / MIB, details)
