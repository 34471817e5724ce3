"""The reference time of training steps, which a study with a budget of seconds fixes once."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moenas.study.session import Session


def fix_training_reference(session: Session, device: str) -> None:
    """Time the reference model on this machine, unless the study knows its time; `device` trains.

    All candidates of the study get their tokens by this one time. A study whose candidates were
    timed without a reference goes on without one, so that its front has one kind of tokens. Where
    the device, its settings or the version of PyTorch have changed, the reference is timed again,
    with a warning. Nothing is timed on a GPU, or where nothing is trained.
    """
    store, space = session.store, session.space
    if not space.train.has_time_budget or all(o.needs != "training" for o in space.objectives):
        return
    from moenas.evaluate import devices
    from moenas.evaluate.latency import device_lock
    from moenas.evaluate.step_reference import reference_key, time_reference

    where = devices.named(device)
    key = reference_key(space.train, where)
    if key is None or key in store.reference_ms():
        return
    paused = [pause.evaluation for pause in session.paused.pauses.values()]
    timed = [e.metrics for e in [*store.evaluations(), *paused] if "step_ms" in e.metrics]
    if timed and not any("step_spread" in metrics for metrics in timed):
        return
    if timed:
        session.events.warn(
            "train.budget: the device or the version of PyTorch is another one than before, so the"
            " reference step is timed again; later candidates can have other tokens"
        )
    with closing(device_lock(where)) as lock:
        store.set_reference_ms(key, 1000 * time_reference(space.train, where, lock))
