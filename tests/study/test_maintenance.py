"""Failed trials run again, and objectives are measured again from stored weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from sqlalchemy import text
from studies import SMALL, assert_sound, fake, scripted, space

from moenas.errors import InputError, StorageLostError, StudyBusyError, StudyStoppedError
from moenas.records import Evaluation, Failure, Job, Plain
from moenas.report.summary import trial_report
from moenas.space.space import Space
from moenas.store.store import Store
from moenas.study import doctor
from moenas.study.launch import Event, load_study, run
from moenas.study.maintenance import enqueue, remeasure, reopen_failed, retry
from moenas.study.uncommitted import UncommittedResults

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

OBJECTIVE = '''"""A number of the trained model."""
direction = "minimize"
unit = "nats"
needs = "training"
def measure(subject):
    """Return it."""
    return {value}
'''


def with_objective(value: str = "subject.training.val_loss * 2", name: str = "s") -> Space:
    """A space of real models, one of whose objectives is a file here."""
    Path("mine.py").write_text(OBJECTIVE.format(value=value))
    file = space(name=name).text.replace("[val_loss, flops", "[val_loss, ./mine.py, flops")
    return Space.parse(file, "s.yaml")


def mine(study: str = "s") -> dict[int, float | None]:
    return {e.trial: e.values.get("mine") for e in load_study(study).view.evaluations}


# --- retry -------------------------------------------------------------------------------------


def test_failed_trials_run_again_under_their_numbers() -> None:
    kinds = {1: "error", 3: "diverged", 4: "timeout"}

    def script(job: Job) -> Evaluation | Failure:
        return Failure(kinds[job.trial], "once") if job.trial in kinds else fake(job)[0]

    pool = scripted(script)
    wanted = space()
    before = run(wanted, trials=6, pool=pool)
    params = [t.params for t in before.optuna.trials]
    seen: list[int] = []

    def good(job: Job) -> Evaluation:
        seen.append(job.trial)
        return fake(job)[0]

    pool = scripted(good)
    retried = retry("s", kinds=["timeout"], pool=pool)
    assert seen == [4]
    retried = retry("s", pool=pool)
    assert sorted(seen) == [1, 4], "what diverged diverges again, unless it is named"
    assert_sound(retried, 6)
    assert {e.trial for e in retried.view.evaluations if e.status == "failed"} == {3}
    assert [t.params for t in retried.optuna.trials] == params
    assert retried.evaluation(1).attempt == 2
    assert "failure" not in retried.optuna.trials[1].user_attrs
    with pytest.raises(InputError, match="no failed trial may end otherwise"):
        retry("s", pool=pool)
    with pytest.raises(InputError, match=r"--failed erorr: study 's' has no such failure\."):
        retry("s", kinds=["erorr"], pool=pool)
    assert_sound(retry("s", kinds=["diverged"], pool=pool), 6)
    assert doctor.examine(Store.open(), "s") == []


def test_what_stopped_a_run_is_retried() -> None:
    pool = scripted(lambda job: Failure("error", "no module 'x'"))
    with pytest.raises(StudyStoppedError):
        run(space(), trials=8, pool=pool)
    pool = scripted(lambda job: fake(job)[0])
    retried = retry("s", pool=pool)
    assert_sound(retried, 8)
    assert all(e.status == "complete" for e in retried.view.evaluations)


def test_a_trial_that_another_process_has_mended_is_not_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = {1}
    pool = scripted(
        lambda job: Failure("error", "once") if job.trial in failing else fake(job)[0],
    )
    run(space(), trials=4, pool=pool)
    failing.clear()
    store, read = Store.open(), Store.evaluations

    def meanwhile(self: Store, name: str) -> list[Evaluation]:
        record = read(self, name)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "evaluations", read)
            with pytest.raises(StudyBusyError):
                retry("s", pool=pool)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Store, "evaluations", meanwhile)
        assert reopen_failed(store, "s") == [1]
    assert_sound(run(space(), trials=4, pool=pool), 4)


def test_a_failure_whose_file_was_left_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = {1}
    pool = scripted(
        lambda job: Failure("error", "once") if job.trial in failing else fake(job)[0],
    )
    drop = UncommittedResults.drop

    def killed(self: UncommittedResults, path: Path) -> None:
        if not path.name.startswith("1-"):
            drop(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(UncommittedResults, "drop", killed)
        run(space(), trials=4, pool=pool)
    failing.clear()
    assert retry("s", pool=pool).evaluation(1).status == "complete"


def test_nothing_is_opened_again_where_a_file_of_the_study_has_changed() -> None:
    failing = with_objective("1/0 if subject.architecture.d_model == 16 else 1.0")
    before = run(failing, trials=4, workers="inline").view.evaluations
    assert "failed" in {e.status for e in before}
    with_objective("1.0")
    with pytest.raises(InputError, match="'mine' have changed"):
        retry("s", workers="inline")
    after = load_study("s").view.evaluations
    assert [(e.trial, e.status) for e in after] == [(e.trial, e.status) for e in before]


# --- objectives measured again -----------------------------------------------------------------


def test_a_changed_objective_is_accepted_and_measured_again() -> None:
    first = run(with_objective(), trials=3, workers="inline")
    losses = {e.trial: e.values["val_loss"] for e in first.view.evaluations}
    seconds = {e.trial: e.seconds["train"] for e in first.view.evaluations}
    changed = with_objective("subject.training.val_loss * 3")
    with pytest.raises(InputError, match=r"'mine' have changed .* --accept-changes goes on"):
        run(changed, trials=4, workers="inline")
    assert mine() == {trial: 2 * loss for trial, loss in losses.items()}
    study = run(changed, trials=4, workers="inline", accept_changes=True)
    assert_sound(study, 4)
    assert mine() == {e.trial: 3 * e.values["val_loss"] for e in study.view.evaluations}
    assert {e.trial: e.seconds["train"] for e in study.view.evaluations[:3]} == seconds
    (change,) = [c for c in study.changes if c["what"] != "space"]
    assert change["what"] == "objective mine"
    assert_sound(run(changed, trials=4, workers="inline"), 4)
    assert doctor.examine(Store.open(), "s") == []


def test_comments_and_docstrings_of_an_objective_may_change() -> None:
    run(with_objective(), trials=1, workers="inline")
    same = with_objective()
    Path("mine.py").write_text("# A comment.\n" + OBJECTIVE.format(value="(2 * 1)*1").replace(
        "(2 * 1)*1", "subject.training.val_loss * 2  # twice"
    ).replace("Return it.", "Return twice the loss."))  # fmt: skip
    edited = Space.parse(same.text, "s.yaml")
    assert_sound(run(edited, trials=2, workers="inline"), 2)


def test_other_changes_are_refused_even_then() -> None:
    run(with_objective(), trials=1, workers="inline")
    changed = with_objective("1.0")
    other = Space.parse(changed.text, "s.yaml", ["train.tokens=1024"])
    with pytest.raises(InputError, match=r"train\.tokens: 512 -> 1024"):
        run(other, trials=2, workers="inline", accept_changes=True)


def test_old_values_of_infeasible_models_go_where_they_cannot_be_measured_again() -> None:
    def limited() -> Space:
        file = f'{with_objective(value).text}\nrequire: ["max_vio < 0.01"]\n'
        return Space.parse(file, "s.yaml", ["search.seed=1"])

    value = "subject.training.val_loss * 2"
    study = run(limited(), trials=4, workers="inline")
    trained = [e.trial for e in study.view.evaluations if e.status == "infeasible" and e.values]
    assert trained
    value = "subject.training.val_loss * 3"
    study = run(limited(), trials=4, workers="inline", accept_changes=True)
    values = {e.trial: e.values for e in study.view.evaluations}
    assert all("mine" not in values[t] and "val_loss" in values[t] for t in trained)
    assert {study.optuna.trials[t].state for t in trained} == {TrialState.PRUNED}
    assert [v["mine"] for v in values.values() if "mine" in v] == [
        3 * v["val_loss"] for v in values.values() if "mine" in v
    ]
    assert doctor.examine(Store.open(), "s") == []


def test_names_order_and_directions_of_objectives_cannot_be_accepted() -> None:
    first = with_objective()
    run(first, trials=1, workers="inline")
    for before, after in (
        ("[val_loss, ./mine.py", "[./mine.py, val_loss"),
        ("./mine.py,", "./mine.py, total_params,"),
        ("./mine.py,", ""),
    ):
        other = Space.parse(first.text.replace(before, after), "s.yaml")
        with pytest.raises(InputError, match="was begun with the objectives val_loss"):
            run(other, trials=2, workers="inline", accept_changes=True)
    Path("mine.py").write_text(OBJECTIVE.format(value="1.0").replace("minimize", "maximize"))
    turned = Space.parse(first.text, "s.yaml")
    for accept in (False, True):
        with pytest.raises(InputError, match=r"mine \(minimize\).* not .*mine \(maximize\)"):
            run(turned, trials=2, workers="inline", accept_changes=accept)
    with pytest.raises(InputError, match="order and directions cannot change"):
        remeasure("s", workers="inline")
    assert_sound(run(with_objective(), trials=2, workers="inline"), 2)


def test_a_result_that_was_not_committed_is_measured_again_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Store.record

    def lost(self: Store, evaluation: Evaluation) -> bool:
        if evaluation.trial == 2:
            raise StorageLostError("the server is gone")
        return record(self, evaluation)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", lost)
        with pytest.raises(StorageLostError):
            run(with_objective(), trials=3, workers="inline")
    changed = with_objective("subject.training.val_loss * 3")
    study = run(changed, trials=3, workers="inline", accept_changes=True)
    assert mine() == {e.trial: 3 * e.values["val_loss"] for e in study.view.evaluations}
    assert_sound(study, 3)


def test_another_run_s_acceptance_is_seen_before_the_first_trial(
    monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    run(space(), trials=2, workers="inline")
    claim = Store.claim

    def late(self: Store, name: str) -> None:
        claim(self, name)
        with self.engine.begin() as connection:
            connection.execute(text('UPDATE moenas_study SET data = \'{"sha256": "0"}\''))

    monkeypatch.setattr(Store, "claim", late)
    with pytest.raises(InputError, match="was begun on another corpus"):
        run(space(), trials=3, workers="inline")
    assert len(jobs) == 2


def test_a_trial_measured_on_another_device_is_refused() -> None:
    device = ["cpu a"]

    def timed(job: Job) -> Evaluation:
        details = {"val_loss": {"reference_key": device[0], "reference_ms": 2.0, "ratio": 0.5}}
        return replace(fake(job)[0], measurements=details)

    pool = scripted(timed)
    run(space(), trials=3, pool=pool)
    device[0] = "gpu b"
    assert remeasure("s", trial=1, pool=pool).failed == 1
    failure = load_study("s").evaluation(1).failure
    assert failure
    assert failure.message == (
        "'val_loss' was timed on [gpu b], but before in this study on [cpu a]"
    )


def test_a_worker_that_dies_while_it_measures_is_tried_again() -> None:
    pool = scripted(lambda job: fake(job)[0])
    run(space(), trials=3, pool=pool)
    deaths = [1, 1]

    def dying(job: Job) -> Evaluation | Failure:
        if job.trial in deaths:
            deaths.remove(job.trial)
            return Failure("crashed", "its worker died")
        return fake(job)[0]

    pool.script = dying
    done = remeasure("s", objective="val_loss", pool=pool)
    assert (done.complete, done.failed, deaths) == (3, 0, [])


def test_trials_whose_objective_raised_are_measured_from_their_weights() -> None:
    raising = with_objective(
        "subject.training.val_loss if subject.architecture.d_model > 16 else 1/0"
    )
    events: list[Event] = []
    study = run(raising, trials=5, workers="inline", listeners=[events.append])
    broken = {e.trial for e in study.view.evaluations if e.status == "failed"}
    assert broken
    assert all(study.evaluation(t).weights_sha256 for t in broken), "training is not thrown away"
    mended = with_objective("subject.training.val_loss")
    done = remeasure("s", workers="inline")
    assert (done.objectives, done.complete, done.failed) == (["mine"], 5, 0)
    assert_sound(run(mended, trials=5, workers="inline"), 5)
    assert mine() == {e.trial: e.values["val_loss"] for e in study.view.evaluations}
    assert {t.state for t in load_study("s").optuna.trials} == {TrialState.COMPLETE}
    assert doctor.examine(Store.open(), "s") == []


def test_an_objective_that_fails_now_fails_its_candidates() -> None:
    run(with_objective(), trials=3, workers="inline")
    with_objective("1/0 if subject.architecture.d_model == 16 else 1.0")
    done = remeasure("s", workers="inline")
    assert done.failed > 0
    assert done.complete + done.failed == 3
    study = load_study("s")
    assert_sound(study, 3)
    assert doctor.examine(Store.open(), "s") == []


def test_an_objective_that_the_study_does_not_have_is_stored_beside() -> None:
    run(space(), trials=2, workers="inline")
    before = load_study("s").front()
    Path("mine.py").write_text(OBJECTIVE.format(value="subject.model.training + 4.0"))
    done = remeasure("s", trial=1, objective="mine.py", workers="inline")
    assert done.trials == [1]
    assert load_study("s").evaluation(1).values["mine"] == 5.0
    assert "mine" not in load_study("s").evaluation(0).values
    after = load_study("s").front()
    assert (after.hypervolume, len(after)) == (before.hypervolume, len(before))
    assert doctor.examine(Store.open(), "s") == []


def test_one_trial_cannot_be_measured_by_a_changed_objective() -> None:
    run(with_objective(), trials=2, workers="inline")
    with_objective("1.0")
    with pytest.raises(InputError, match="all trials must be measured again"):
        remeasure("s", trial=0, objective="mine", workers="inline")
    assert all(value and not math.isclose(value, 1.0) for value in mine().values())


def test_measuring_the_same_again_gives_the_same() -> None:
    run(with_objective(), trials=2, workers="inline")
    before = mine()
    remeasure("s", objective="mine", workers="inline")
    remeasure("s", trial=1, workers="inline")
    assert mine() == before
    with pytest.raises(InputError, match="no objective's file has changed; name one"):
        remeasure("s", workers="inline")


# --- enqueue -----------------------------------------------------------------------------------

MINE = """\
architecture:
  vocab_size: 256
  d_model: {width}
  blocks:
    - mixer: {{kind: attention, head_dim: 8}}
      ffn: {{kind: dense, activation: swiglu, d_ff: 16}}
"""


def mine_file(width: int) -> str:
    path = Path(f"mine{width}.yaml")
    path.write_text(MINE.format(width=width))
    return str(path)


def test_an_architecture_is_enqueued_once_and_evaluated_next() -> None:
    small = space(SMALL).with_search(sampler="gray_box")
    run(small, trials=1, pool=scripted(lambda job: fake(job)[0]))
    plain = load_study("s").store.architecture("s", 0)
    there, *others = sorted((16, 24, 32), key=lambda width: width != plain["d_model"])
    layers = sum(group["repeat"] for group in plain["blocks"])
    files = [mine_file(width) for width in others]
    rows = enqueue("s", files)
    assert [(row["trial"], row["status"]) for row in rows] == [(1, "enqueued"), (2, "enqueued")]
    again = enqueue("s", [files[1], mine_file(there)])
    assert [row["trial"] for row in again] == [2, 0 if layers == 1 else 3]
    assert again[0]["status"] == "known"
    study = run(small, trials=4, pool=scripted(lambda job: fake(job)[0]))
    assert_sound(study, 4)
    assert [study.store.architecture("s", i)["d_model"] for i in (1, 2)] == others
    report = trial_report(study.store, "s", 1)
    assert report["enqueued_from"] == files[0]


def test_a_study_that_runs_evaluates_what_is_enqueued_meanwhile() -> None:
    rows: list[Plain] = []

    def script(job: Job) -> Evaluation:
        if not rows:
            plains = load_study("s").store.architectures("s").values()
            drawn = {p["d_model"] for p in plains if [g["repeat"] for g in p["blocks"]] == [1]}
            rows.extend(enqueue("s", [mine_file(min({16, 24, 32} - drawn))]))
        return fake(job)[0]

    study = run(space(SMALL).with_search(seed=1), trials=5, pool=scripted(script))
    assert_sound(study, 5)
    assert rows[0]["status"] == "enqueued"
    source = trial_report(study.store, "s", rows[0]["trial"])["enqueued_from"]
    assert source == rows[0]["source"]


def test_nothing_is_enqueued_if_one_architecture_does_not_fit() -> None:
    run(space(SMALL), trials=1, pool=scripted(lambda job: fake(job)[0]))
    with pytest.raises(InputError, match=r"mine40\.yaml:3:12: architecture\.d_model: mine40"):
        enqueue("s", [mine_file(16), mine_file(40)])
    assert len(load_study("s").optuna.trials) == 1
