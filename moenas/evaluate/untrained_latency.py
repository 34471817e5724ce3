"""Latencies of models with their first weights, by the objectives that time trained ones."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch

from moenas.evaluate.devices import prepare_process, tidy
from moenas.evaluate.footprint import require_fit
from moenas.evaluate.latency import device_lock
from moenas.evaluate.subject import Subject
from moenas.evaluate.threads import cpu_threads
from moenas.space.objective import Measurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moenas.data.corpus import Corpus
    from moenas.model.architecture import Architecture
    from moenas.space.objective import Objective
    from moenas.space.space import Space


def measure_untrained(
    space: Space,
    corpus: Corpus,
    architecture: Architecture,
    objectives: Sequence[Objective],
    device: torch.device,
) -> dict[str, Measurement]:
    """Build a model and measure some latencies of it; return objective -> measurement.

    The protocol, the lock of the device and the text are the same as in a study. The weights are
    the first ones of the seed of the space, so the routers are untrained.

    Raises:
        NoRoomError: if the model does not fit the device.
        CandidateError: if an objective gives what is no latency.
    """
    prepare_process(device)
    try:
        with cpu_threads(), closing(device_lock(device)) as lock:
            with lock.shared():
                require_fit(architecture, space.train, device, training=False)
                model = architecture.build(device, space.search.seed)
            subject = Subject(
                architecture=architecture,
                cost=space.cost(architecture),
                recipe=space.train,
                protocol=space.measure,
                corpus=corpus,
                device=device,
                seed=space.search.seed,
                device_lock=lock,
                built=model,
            )
            return {objective.name: objective.measure(subject) for objective in objectives}
    finally:
        tidy(device)
