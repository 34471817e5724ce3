"""Peak memory of training steps, measured in a second model of the candidate."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moenas.evaluate.footprint import require_fit
from moenas.evaluate.memory import peak_bytes
from moenas.evaluate.training import train
from moenas.model.multi_token import build_heads

if TYPE_CHECKING:
    from moenas.evaluate.subject import Subject


def training_peak(subject: Subject, steps: int) -> int:
    """Return the peak of bytes of some training steps of a candidate, in a model of its own.

    Raises:
        NoRoomError: if the candidate does not fit its device.
    """
    architecture, device = subject.architecture, subject.device
    recipe = subject.recipe
    recipe = dataclasses.replace(recipe, tokens=steps * recipe.batch * recipe.context)
    with subject.device_lock.shared():
        require_fit(architecture, recipe, device, training=True, sharers=subject.sharers)
        model = architecture.build(device, subject.seed)
        held = list(model.state_dict(keep_vars=True).values())
        heads = build_heads(recipe.heads, architecture, device, subject.seed)
        if heads is not None:
            held = [*held, *heads.state_dict(keep_vars=True).values()]
        rows = train(model, subject.corpus, recipe, subject.seed, heads=heads)
        return peak_bytes(lambda: list(rows), held, device)
