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
from jobs import GUEST
from studies import ARCHITECTURE, SMALL, assert_sound, press_ctrl_c, value_of

from moenas.cli.progress import line
from moenas.dashboard.notes import study_note
from moenas.errors import MachineError, NoCandidateError
from moenas.records import CurvePoint, Evaluation, Failure, Job, RungResult
from moenas.report.summary import status_report, status_text, trial_report
from moenas.search.trials import OptunaTrials
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.store.checkpoints import checkpoint_path
from moenas.store.store import Store
from moenas.store.study_store import StudyStore
from moenas.store.weights import weights_path
from moenas.study import doctor, result_processing
from moenas.study.events import Event, Interrupted
from moenas.study.launch import Study, load_study, run
from moenas.study.maintenance import retry
from moenas.workers.pool import Inline

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]


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


def rungs_of(study: Study) -> list[RungResult]:
    return rung_rows.results(study.store, study.name)


def files_of(study: Study) -> list[str]:
    """Files in the folder of a study."""
    folder = weights_path(study.store.runs, study.name, 0).parents[1]
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_no_leftovers(study: Study) -> None:
    """Only the weights of complete trials lie there."""
    complete = [e.trial for e in study.view.evaluations if e.status == "complete"]
    assert files_of(study) == sorted(f"{trial}/model.safetensors" for trial in complete)


def asha(losses: Mapping[int, Sequence[float]], factor: int) -> list[tuple[int, int]]:
    """Algorithm 2 of arXiv 1810.05934 with one worker, by hand: (trial, rung that it trains to).

    `losses` are those of each trial at each rung and at the end, in the order in which the trials
    are drawn. Once all are drawn, the number that trains on is rounded up.
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
                top = best[: -(-len(best) // factor) if at_end else len(best) // factor]
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
        evaluation = evaluate(job)
        done.append((job.trial, int(evaluation[0].metrics.get("rung", 3))))
        return evaluation

    study = run(halving(), pool=Inline(noted))  # type: ignore[arg-type]
    assert_sound(study, 14)
    whole = run(halving("none", name="whole"), workers="inline")
    losses = {
        e.trial: [row["val_loss"] for row in e.curve if "val_loss" in row]
        for e in whole.view.evaluations
        if not e.is_copy
    }
    assert len(losses[0]) == 3
    assert done == asha(losses, 3)
    statuses = {e.trial: e.status for e in study.view.evaluations}
    complete = {trial for trial, rung in done if rung == 3}
    copied = {e.trial for e in study.view.evaluations if e.is_copy}
    full = {trial for trial, status in statuses.items() if status == "complete"}
    assert complete == full - copied
    assert set(statuses.values()) == {"complete", "stopped"}
    for trial in complete:  # what was promoted is what an uninterrupted run gives
        assert study.evaluation(trial).values == whole.evaluation(trial).values
    assert [t.state.name for t in study.optuna.trials].count("PRUNED") == len(statuses) - len(full)
    assert_no_leftovers(study)
    assert {m.trial for m in study.front()} <= complete


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
    evaluation = Evaluation(job.study, job.trial, job.attempt, "complete", "", curve=curve)
    if before < 2:
        known = {name: value for name, value in values.items() if name != "val_loss"}
        metrics = {"rung": float(before + 1)}
        evaluation = dataclasses.replace(evaluation, status="paused", values=known, metrics=metrics)
        return evaluation, f"{job.trial} {before + 1}".encode()
    values["val_loss"] = curve[-1]["val_loss"]
    metrics = {"val_loss": values["val_loss"]}
    return dataclasses.replace(evaluation, values=values, metrics=metrics), b"weights"


def trained() -> Counter[tuple[int, int]]:
    """(Trial, rung that it was trained to) -> times."""
    lines = Path("trained").read_text().splitlines()
    return Counter((int(trial), int(rung)) for trial, rung in map(str.split, lines))


def ctrl_c(job: Job) -> tuple[Evaluation, bytes | None]:
    """The stand-in, with Ctrl-C before the tenth rung; the file `trained` must be there."""
    if sum(trained().values()) == 9:
        press_ctrl_c()
    return stand_in(job)


POINTS = {
    "the checkpoint is there, and its row is not": (result_processing, "write_checkpoint"),
    "the row is there, and the former checkpoint too": (rung_rows, "add"),
    "the promotion is stored, and no job is started": (rung_rows, "promote"),
    "a job runs": (None, ""),
    "an evaluation is stored, and Optuna is not told": (StudyStore, "record"),
    "Optuna is told, and the checkpoint is still there": (OptunaTrials, "tell"),
}


Evaluate = Callable[[Job], tuple[Evaluation, bytes | None]]


def killed_run(of: Space, owner: Any, name: str, number: int, evaluate: Evaluate = stand_in) -> int:
    """Run a study in a child that kills itself after the call `number` of a function.

    Without an owner the function is `evaluate`, which stands for a worker.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        calls = itertools.count(1)

        def die_after(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                returned = function(*args, **kwargs)
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return returned

            return call

        pool = Inline(evaluate if owner else die_after(evaluate))
        if owner:
            setattr(owner, name, die_after(getattr(owner, name)))
        run(of, pool=pool)
    finally:
        os._exit(1)


PREDICTIVE = "{kind: predictive, min_complete: 3, min_correlation: 0, min_chance: 0.5}"
KILLS = [
    *((HALVING, point, 1) for point in POINTS),
    (PREDICTIVE, "the checkpoint is there, and its row is not", 9),
    *(pytest.param(HALVING, point, 4, marks=pytest.mark.slow) for point in POINTS),
    *(
        pytest.param(PREDICTIVE, point, 9, marks=pytest.mark.slow)
        for point in ("the row is there, and the former checkpoint too", "a job runs")
    ),
]
UNINTERRUPTED: dict[str, tuple[Counter[tuple[int, int]], dict[int, str]]] = {}
"""Early stopping -> what an uninterrupted run trained, and the status of each trial."""


def uninterrupted(stopping: str) -> tuple[Counter[tuple[int, int]], dict[int, str]]:
    """Return what a run without a kill gives; it is run once."""
    if stopping not in UNINTERRUPTED:
        whole = run(halving(stopping), pool=Inline(stand_in), storage="sqlite:///whole.db")
        statuses = {e.trial: e.status for e in whole.view.evaluations}
        UNINTERRUPTED[stopping] = trained(), dict(statuses)
        Path("trained").unlink()
    return UNINTERRUPTED[stopping]


@pytest.mark.parametrize(("stopping", "point", "number"), KILLS)
def test_a_killed_study_trains_no_rung_twice_but_the_one_in_hand(
    stopping: str, point: str, number: int
) -> None:
    of = halving(stopping)
    wanted, statuses = uninterrupted(stopping)
    assert {"complete", "stopped"} <= set(statuses.values())
    assert killed_run(of, *POINTS[point], number) == signal.SIGKILL
    study = run(of, pool=Inline(stand_in))
    assert_sound(study, 14)
    again = trained()
    assert again.keys() == wanted.keys()
    assert sorted(again.values())[-2:] in ([1, 1], [1, 2])
    assert {e.trial: e.status for e in study.view.evaluations} == statuses
    assert_no_leftovers(study)
    assert not rung_rows.pauses(study.store, "s")
    assert doctor.examine(study.store, "s") == []


def test_a_run_that_is_stopped_keeps_its_paused_candidates() -> None:
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


# --- what else happens to a candidate that paused --------------------------------------------------


def test_a_copy_of_a_stopped_model_is_stopped() -> None:
    small = Space.parse(halving().text.replace(ARCHITECTURE, SMALL), "s.yaml")
    study = run(small, trials=6, pool=Inline(stand_in))
    assert_sound(study, 6)
    rows = {e.trial: e for e in study.view.evaluations}
    copies = [e for e in rows.values() if e.is_copy]
    sources = [rows[int(e.metrics["copied_from"])] for e in copies]
    assert [e.status for e in copies] == [e.status for e in sources]
    assert "stopped" in {e.status for e in copies}
    assert max(trained().values()) == 1
    assert_no_leftovers(study)


def test_a_candidate_that_fails_after_a_rung_is_retried_from_the_start() -> None:
    broken = True

    def evaluate(job: Job) -> Any:
        if job.checkpoint is not None and broken:
            failure = Failure("out_of_memory", "too large")
            return Evaluation(
                job.study, job.trial, job.attempt, "failed", "", failure=failure
            ), None
        return stand_in(job)

    with pytest.raises(NoCandidateError):
        run(halving(), pool=Inline(evaluate), trials=3)
    store = load_study("s").store
    (failed,) = [e.trial for e in store.evaluations("s") if e.status == "failed"]
    assert [r.trial for r in rung_rows.results(store, "s") if r.promoted] == [failed]
    assert files_of(load_study("s")) == []
    broken = False
    retried = retry("s", pool=Inline(evaluate))
    assert_sound(retried, 3)
    assert (trained()[failed, 1], trained()[failed, 2]) == (2, 1)
    assert retried.evaluation(failed).status == "complete"
    assert_no_leftovers(retried)


def test_a_lost_checkpoint_costs_the_training_and_no_trial() -> None:
    Path("trained").touch()
    with pytest.raises(Interrupted):
        run(halving(), pool=Inline(ctrl_c))
    store = load_study("s").store
    first, second, *_ = [t for t, p in rung_rows.pauses(store, "s").items() if p.result.rung == 1]
    checkpoint_path(store.runs, "s", first, 1).unlink()
    checkpoint_path(store.runs, "s", second, 1).write_bytes(b"something else")
    texts = [finding.text for finding in doctor.examine(store, "s")]
    assert len(texts) == 2
    assert all("the next run trains the candidate again from the start" in text for text in texts)
    events: list[Event] = []
    study = run(halving(HALVING), pool=Inline(stand_in), listeners=[events.append])
    assert_sound(study, 14)
    again = {trial for (trial, rung), times in trained().items() if times > 1}
    warned = {e.trial for e in events if e.kind == "warning"}
    assert again == warned <= {first, second}  # who is stopped needs no checkpoint
    assert_no_leftovers(study)


def test_a_fault_of_the_machine_repeats_the_rung_in_hand_alone() -> None:
    faults = iter([True])

    def evaluate(job: Job) -> Any:
        if job.checkpoint is not None and next(faults, False):
            raise MachineError("no space left on device")
        return stand_in(job)

    study = run(halving(), pool=Inline(evaluate))
    assert_sound(study, 14)
    assert set(trained().values()) == {1}


def test_checkpoints_on_the_disk_are_no_more_than_the_limit() -> None:
    seen = []

    def evaluate(job: Job) -> Any:
        seen.append(sum("checkpoint" in name for name in files_of(Study(store, "s"))))
        return stand_in(job)

    store = Store.open("sqlite:///moenas.db", create=True)
    limited = halving("{kind: successive_halving, min_correlation: 0, max_paused: 2}")
    study = run(limited, pool=Inline(evaluate))
    assert_sound(study, 14)
    assert 2 <= max(seen) <= 3  # two wait, and one trains on from its own
    assert_no_leftovers(study)


def test_status_and_show_know_rungs() -> None:
    Path("trained").touch()
    lines: list[str] = []
    with pytest.raises(Interrupted):
        run(halving(), pool=Inline(ctrl_c), listeners=[lambda e: lines.append(line(e))])
    store = load_study("s").store
    paused = rung_rows.pauses(store, "s")
    trial, pause = next(iter(paused.items()))
    assert f"trial {trial} paused: rung 1 of 2, validation loss" in "\n".join(lines)
    report = status_report(store, "s")
    assert (report["paused"], report["stopped"]) == (len(paused), 0)
    shown = trial_report(store, "s", trial)
    assert (shown["status"], shown["metrics"]["rung"]) == ("paused", pause.result.rung)
    study = run(halving(), pool=Inline(stand_in), listeners=[lambda e: lines.append(line(e))])
    report = status_report(store, "s")
    statuses = Counter(e.status for e in study.view.evaluations)
    assert (
        report["stopped"]
        == statuses["stopped"]
        == list(study.dataframe()["state"]).count("stopped")
    )
    assert report["paused"] == 0
    first = report["rungs"][0]
    assert first["reached"] == len({t for t, rung in trained() if rung == 1})
    text = status_text(report)
    assert f"  stopped {statuses['stopped']}, paused 0\n  rung 1 (256 tokens): " in text
    assert any("stopped: at rung 1, validation loss" in text for text in lines)
    assert "stopped early" in study_note(study.view)


@pytest.mark.parametrize("stopping", [HALVING, PREDICTIVE])
def test_a_changed_objective_leaves_no_old_value_at_a_rung(stopping: str) -> None:
    def objective(value: str) -> None:
        Path("size.py").write_text(GUEST.format(needs="cost", result=value))

    def measured(job: Job) -> Any:
        if job.known is None:
            return stand_in(job)
        values = {"size": 7.0}
        return Evaluation(job.study, job.trial, job.attempt, "complete", "", values=values), None

    objective("1")
    first = halving(stopping, objectives="[val_loss, ./size.py]")
    # By then three candidates are complete with `predictive`, and another one is paused.
    assert killed_run(first, rung_rows, "add", 7) == signal.SIGKILL
    paused = rung_rows.pauses(load_study("s").store, "s")
    assert paused
    objective("2")
    changed = halving(stopping, objectives="[val_loss, ./size.py]")
    study = run(changed, pool=Inline(measured), accept_changes=True)
    assert_sound(study, 14)
    assert {e.status for e in study.view.evaluations} == {"complete", "stopped"}
    assert_no_leftovers(study)


def test_a_study_of_two_objectives_is_predicted() -> None:
    stopping = "{kind: predictive, min_complete: 3, min_correlation: 0}"
    of = halving(stopping, objectives="[val_loss, flops_per_token]")
    study = run(of, pool=Inline(stand_in))
    assert_sound(study, 14)
    statuses = Counter(e.status for e in study.view.evaluations)
    assert statuses["stopped"] > 0
    assert statuses["complete"] >= 3
    assert_no_leftovers(study)
