"""The cost of a pause at a rung: one candidate trained in one job, and in a job for each rung.

`python benchmarks/rungs.py` prints the seconds that a rung adds in one process, and the size of a
checkpoint. Both ways are taken in turns, and the median difference of their CPU times counts. Both
validate at each rung, so the time of that is not counted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

from moenas.data import loading
from moenas.evaluate.job import evaluate
from moenas.records import Job
from moenas.space.space import Space

RUNGS, ROUNDS = 2, 5
OVERRIDES = (
    *(f"train.rungs={RUNGS}", "objectives=[val_loss]", "train.val_tokens=256"),
    # A short run: the steps are the same both ways, and would only add noise.
    *("train.tokens=2304", "train.batch=4", "train.context=64"),
)


def job_of(space: Space) -> Job:
    """Return the job of the first feasible random architecture."""
    return Job(
        study=space.name,
        trial=0,
        attempt=1,
        architecture=space.require_feasible().plain(),
        objectives={"val_loss": None},
        data=space.data,
        data_sha256=loading.load(space.data).sha256,
        train=space.train.plain(),
        measure=space.measure.plain(),
        seed=0,
    )


def whole(job: Job) -> float:
    """Return the CPU seconds of a candidate that never pauses."""
    began = time.process_time()
    evaluation, _ = evaluate(job)
    assert evaluation.status == "complete", evaluation.failure
    return time.process_time() - began


def paused(job: Job) -> tuple[float, int]:
    """Return the CPU seconds of a candidate that pauses at each rung, and bytes of a checkpoint."""
    began, size = time.process_time(), 0
    job = replace(job, rung_limits=[None] * RUNGS)
    for _ in range(RUNGS):
        evaluation, checkpoint = evaluate(job)
        assert isinstance(checkpoint, bytes), evaluation.failure
        size = len(checkpoint)
        job = replace(job, paused=evaluation.plain(), checkpoint=checkpoint)
    whole(job)
    return time.process_time() - began, size


def main() -> None:
    """Print the cost of a rung."""
    job = job_of(Space.load("tiny", OVERRIDES))
    whole(job)  # what the first job of a process loads
    differences, size = [], 0
    for _ in range(ROUNDS):
        alone = whole(job)
        together, size = paused(job)
        differences.append((together - alone) / RUNGS)
    parameters = evaluate(replace(job, objectives={"total_params": None}))[0].cost["params"]
    print(f"a rung adds {statistics.median(differences):.2f} s of CPU time, checkpoint included")
    print(f"a checkpoint has {size / parameters:.1f} bytes a parameter ({parameters:,} parameters)")


if __name__ == "__main__":
    main()
