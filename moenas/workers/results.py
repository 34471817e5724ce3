"""A pool of jobs, and the results that it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from moenas.checked import checked_evaluation
from moenas.failures import MESSAGE, clean, error_line
from moenas.records import Evaluation, Failure, Job, WeightsFile
from moenas.resources import sha256
from moenas.store.weights import is_draft

Weights = bytes | WeightsFile
"""Trained weights as safetensors: the bytes, or the file that they were written to."""
Evaluate = Callable[[Job], tuple[Evaluation, Weights | None]]
"""Evaluates a job; gives back the trained weights too, if there are any."""


@dataclass(frozen=True)
class Result:
    """The result of a job."""

    job: Job
    outcome: Evaluation | Failure
    """An evaluation that was checked; a Failure if none came back, and for `environment`."""
    weights: Weights | None = field(default=None, repr=False)


class Pool(Protocol):
    """Takes jobs and gives back results as they are done, in any order."""

    @property
    def capacity(self) -> int:
        """How many jobs are worked on at a time, at least 1; more must not be submitted."""

    @property
    def sharers(self) -> int:
        """How many jobs share the memory of one device, at most."""

    @property
    def device(self) -> str:
        """Where its jobs run: cpu or cuda; a job must name it."""

    def submit(self, job: Job) -> None:
        """Take a job.

        Raises:
            StorageLostError: if what the jobs run on is gone.
        """

    def wait(self, timeout: float) -> list[Result]:
        """Return what is done; wait for at least one result, at most `timeout` seconds.

        Raises:
            StorageLostError: if what the jobs run on is gone.
        """

    def close(self) -> None:
        """Stop what is running, without a result, and free everything."""


def checked_result(job: Job, sent: object, weights: object) -> Result:
    """Return the result of a job from its reply; a reply that is no evaluation is a Failure."""
    try:
        if isinstance(sent, Evaluation):
            sent = sent.plain()
        evaluation = checked_evaluation(sent, job)
        taken = _checked_weights(weights, job, evaluation.weights_sha256)
    except Exception as error:
        text = clean(str(error) if type(error) is ValueError else error_line(error), MESSAGE)
        return Result(job, Failure("invalid", f"the result is no evaluation: {text}"))
    if evaluation.failure is not None and evaluation.failure.kind == "environment":
        return Result(job, evaluation.failure)
    return Result(job, evaluation, taken)


def _checked_weights(weights: object, job: Job, digest: str | None) -> Weights | None:
    """Return the weights that came with an evaluation; raise ValueError if they are no such."""
    if isinstance(weights, WeightsFile):
        if not is_draft(weights, job.weights_to):
            raise ValueError(f"{weights.path} is not where the weights were to be written")
        own = weights.sha256
    elif isinstance(weights, bytes):
        own = sha256(weights)
    elif weights is None:
        return None
    else:
        raise ValueError(f"weights are a {type(weights).__name__}, not bytes")
    if digest not in (None, own):
        raise ValueError("the weights are not those whose digest came with them")
    return weights
