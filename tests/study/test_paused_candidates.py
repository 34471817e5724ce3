"""Early stopping: who trains on, exact totals after every kind of end, and no file left over."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from studies import ARCHITECTURE, assert_sound, press_ctrl_c, value_of

from moenas.records import CurvePoint, Evaluation, Job, RungResult
from moenas.search.trials import OptunaTrials
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.store.study_store import StudyStore
from moenas.store.weights import weights_path
from moenas.study import doctor, result_processing
from moenas.study.events import Interrupted
from moenas.study.launch import Study, load_study, run
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


# --- a stand-in for training ---------------------------------------------------------------------


def stand_in(job: Job) -> tuple[Evaluation, bytes | None]:
    """Made-up losses that fall from rung to rung; a checkpoint says whose it is.

    Each job adds a line to the file `trained`: trial, and the rung that it trained to (3: the end).
    """
    before = 0
    if job.checkpoint is not None:
        assert job.paused is not None
        assert job.checkpoint == f"{job.trial} {job.paused['metrics']['rung']:.0f}".encode()
        before = int(job.paused["metrics"]["rung"])
    assert job.rung_limits == [None, None]
    curve: list[CurvePoint] = [
        {"tokens": 256 * rung, "val_loss": value_of(job.architecture) + 1 / rung}
        for rung in range(1, before + 2)
    ]
    with Path("trained").open("a") as file:
        file.write(f"{job.trial} {before + 1}\n")
    values = {name: float(len(str(job.architecture))) for name in job.objectives}
    found = Evaluation(job.study, job.trial, job.attempt, "complete", "", curve=curve)
    if before < 2:
        known = {name: value for name, value in values.items() if name != "val_loss"}
        metrics = {"rung": float(before + 1)}
        found = dataclasses.replace(found, status="paused", values=known, metrics=metrics)
        return found, f"{job.trial} {before + 1}".encode()
    values["val_loss"] = curve[-1]["val_loss"]
    metrics = {"val_loss": values["val_loss"]}
    return dataclasses.replace(found, values=values, metrics=metrics), b"weights"


def trained() -> Counter[tuple[int, int]]:
    """(Trial, rung that it was trained to) -> times."""
    lines = Path("trained").read_text().splitlines()
    return Counter((int(trial), int(rung)) for trial, rung in map(str.split, lines))


POINTS = {
    "the checkpoint is there, and its row is not": (result_processing, "write_checkpoint"),
    "the row is there, and the former checkpoint too": (rung_rows, "add"),
    "the promotion is stored, and no job is started": (rung_rows, "promote"),
    "a job runs": (None, ""),
    "an evaluation is stored, and Optuna is not told": (StudyStore, "record"),
    "Optuna is told, and the checkpoint is still there": (OptunaTrials, "tell"),
}


def killed_run(owner: Any, name: str, number: int) -> int:
    """Run a study in a child that kills itself after the call `number` of a function."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        calls = itertools.count(1)

        def die_after(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                found = function(*args, **kwargs)
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return call

        pool = Inline(stand_in if owner else die_after(stand_in))
        if owner:
            setattr(owner, name, die_after(getattr(owner, name)))
        run(halving(), pool=pool)
    finally:
        os._exit(1)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_study_trains_no_rung_twice_but_the_one_in_hand(point: str, number: int) -> None:
    whole = run(halving(), pool=Inline(stand_in), storage="sqlite:///whole.db")
    wanted, statuses = trained(), {e.trial: e.status for e in whole.view.evaluations}
    Path("trained").unlink()
    assert killed_run(*POINTS[point], number) == signal.SIGKILL
    found = run(halving(), pool=Inline(stand_in))
    assert_sound(found, 14)
    again = trained()
    assert again.keys() == wanted.keys()
    assert sorted(again.values())[-2:] in ([1, 1], [1, 2])
    assert {e.trial: e.status for e in found.view.evaluations} == statuses
    assert_no_leftovers(found)
    assert not rung_rows.pauses(found.store, "s")
    assert doctor.examine(found.store, "s") == []


def test_a_run_that_is_stopped_keeps_its_paused_candidates() -> None:
    def ctrl_c(job: Job) -> Any:
        if sum(trained().values()) == 9:
            press_ctrl_c()
        return stand_in(job)

    Path("trained").touch()
    with pytest.raises(Interrupted):
        run(halving(), pool=Inline(ctrl_c))
    store = load_study("s").store
    paused = rung_rows.pauses(store, "s")
    assert len(paused) > 3
    names = [
        f"{trial}/checkpoint-{pause.result.rung}.safetensors" for trial, pause in paused.items()
    ]
    assert set(names) <= set(files_of(load_study("s")))
    assert doctor.examine(store, "s") == []
    assert_sound(run(halving(), pool=Inline(stand_in)), 14)
    assert set(trained().values()) == {1}
