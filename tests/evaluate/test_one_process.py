"""Candidates one after another in one process: none changes another's numbers or leaves memory."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

import pytest
import torch
from jobs import MakeJob, without_times
from wide_space import wide

from moenas.evaluate.job import evaluate
from moenas.model.architecture import Architecture
from moenas.processes import resident_bytes
from moenas.records import Job
from moenas.space.sections import Recipe

pytestmark = pytest.mark.integration

RECIPE = Recipe(tokens=3 * 2 * 16, context=16, batch=2, val_tokens=64, dtype="float32")
MIB = 2**20


def drawn(count: int, make: MakeJob) -> list[Job]:
    """Jobs of random candidates of the wide space, which has every kind of part."""
    models: list[Job] = []
    for architecture in wide().feasible(100 * count):
        if isinstance(architecture, Architecture):
            plain = architecture.plain()
            job = make("val_loss", trial=len(models), architecture=plain, train=RECIPE.plain())
            models.append(replace(job, seed=len(models)))
        if len(models) == count:
            break
    return models


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def assert_nothing_is_left(jobs: list[Job], first: int, growth: int) -> None:
    """From candidate `first` on no tensor more lives, and memory grows by `growth` at most."""
    tensors = memory = 0
    for number, job in enumerate(jobs):
        evaluation, _ = evaluate(job)
        assert evaluation.failure is None or evaluation.failure.kind in ("diverged", "collapsed"), (
            evaluation
        )
        del evaluation
        if number == first:
            tensors, memory = live_tensors(), resident_bytes(os.getpid())
    assert live_tensors() <= tensors
    assert resident_bytes(os.getpid()) - memory < growth


def test_candidates_leave_no_memory_behind(make_job: MakeJob) -> None:
    held = torch.zeros(3)
    assert live_tensors() > 0, "the count sees tensors"
    del held
    assert_nothing_is_left(drawn(12, make_job), first=5, growth=16 * MIB)


@pytest.mark.slow
def test_a_hundred_candidates_leave_no_memory_behind(make_job: MakeJob) -> None:
    assert_nothing_is_left(drawn(100, make_job), first=20, growth=32 * MIB)


def test_the_order_of_candidates_changes_no_number(make_job: MakeJob) -> None:
    jobs = drawn(6, make_job)
    there = {job.trial: without_times(evaluate(job)[0]) for job in jobs}
    back = {job.trial: without_times(evaluate(job)[0]) for job in reversed(jobs)}
    assert there == back
