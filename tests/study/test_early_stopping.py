"""Early stopping: who trains on, exact totals after every kind of end, and no file left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from studies import ARCHITECTURE, assert_sound, space

from moenas.records import Job, RungResult
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.store.weights import weights_path
from moenas.study.launch import Event, Study, run
from moenas.workers.pool import Inline

pytestmark = pytest.mark.usefixtures("study_folder")


HALVING = "{kind: successive_halving, min_correlation: 0}"


def halving(stopping: str = HALVING, *, name: str = "s", objectives: str = "[val_loss]") -> Space:
    """A space whose candidates are trained for 12 steps, with rungs after 4 and 8."""
    return Space.parse(
        f"name: {name}\n{ARCHITECTURE}\nobjectives: {objectives}\n"
        "train: {tokens: 768, context: 16, batch: 4, val_tokens: 64, dtype: float32, rungs: 2}\n"
        f"search: {{trials: 14, seed: 3, sampler: random, early_stopping: {stopping}}}\n"
        f"data: {{files: [{Path.cwd()}/corpus.txt]}}\n",
        "s.yaml",
    )


def rungs_of(found: Study) -> list[RungResult]:
    return rung_rows.results(found.store, found.name)


def files_of(found: Study) -> list[str]:
    """Files in the folder of a study."""
    folder = weights_path(found.store.runs, found.name, 0).parents[1]
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_no_leftovers(found: Study) -> None:
    """Only the weights of complete trials lie there."""
    complete = [e.trial for e in found.view.evaluations if e.status == "complete"]
    assert files_of(found) == sorted(f"{trial}/model.safetensors" for trial in complete)


def asha(losses: Mapping[int, Sequence[float]], factor: int) -> list[tuple[int, int]]:
    """Algorithm 2 of arXiv 1810.05934 with one worker, by hand: (trial, rung that it trains to).

    `losses` are those of each trial at each rung and at the end, in the order in which the trials
    are drawn. At the end of the study each rung promotes at least one.
    """
    waiting = list(losses)
    n_rungs = len(losses[0]) - 1
    reached: list[list[int]] = [[] for _ in range(n_rungs)]
    promoted: list[set[int]] = [set() for _ in range(n_rungs)]
    jobs = []
    while True:
        job = None
        for at_end in (False, True):
            if at_end and waiting:
                break
            for k in reversed(range(n_rungs)):
                best = sorted(reached[k], key=lambda t: (losses[t][k], t))
                top = best[: max(len(best) // factor, int(at_end))]
                for trial in top:
                    if trial not in promoted[k] and job is None:
                        promoted[k].add(trial)
                        job = (trial, k + 1)
            if job is not None:
                break
        if job is None:
            if not waiting:
                return jobs
            job = (waiting.pop(0), 0)
        trial, k = job
        jobs.append((trial, k + 1))
        if k < n_rungs:
            reached[k].append(trial)


def test_one_objective_and_one_worker_is_asha_exactly() -> None:
    from moenas.evaluate.job import evaluate

    done: list[tuple[int, int]] = []

    def noted(job: Job) -> object:
        found = evaluate(job)
        done.append((job.trial, int(found[0].metrics.get("rung", 3))))
        return found

    found = run(halving(), pool=Inline(noted))  # type: ignore[arg-type]
    assert_sound(found, 14)
    whole = run(halving("none", name="whole"), workers="inline")
    losses = {
        e.trial: [row["val_loss"] for row in e.curve if "val_loss" in row]
        for e in whole.view.evaluations
        if not e.is_copy
    }
    assert len(losses[0]) == 3
    assert done == asha(losses, 3)
    statuses = {e.trial: e.status for e in found.view.evaluations}
    complete = {trial for trial, rung in done if rung == 3}
    copied = {e.trial for e in found.view.evaluations if e.is_copy}
    full = {trial for trial, status in statuses.items() if status == "complete"}
    assert complete == full - copied
    assert set(statuses.values()) == {"complete", "stopped"}
    for trial in complete:  # what was promoted is what an uninterrupted run gives
        assert found.evaluation(trial).values == whole.evaluation(trial).values
    assert [t.state.name for t in found.optuna.trials].count("PRUNED") == len(statuses) - len(full)
    assert_no_leftovers(found)
    assert {m.trial for m in found.front()} <= complete
