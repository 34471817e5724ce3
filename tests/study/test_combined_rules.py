"""Early stopping together with asks ahead, rules that stop a study, and reuse."""

from __future__ import annotations

import pytest
from studies import Scripted, assert_sound, counts, fake
from test_paused_candidates import HALVING, assert_no_leftovers, halving, stand_in, trained

from moenas.search import gray_box
from moenas.search.gray_box import Described, Evaluated, GrayBox
from moenas.search.rungs import Estimate
from moenas.space.space import Space
from moenas.store import rungs as rung_rows
from moenas.store.spending import spending
from moenas.study import doctor
from moenas.study.launch import Study, run
from moenas.workers.pool import Result

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("study_folder")]

BOTH = "[val_loss, flops_per_token]"


class Trains(Scripted):
    """A pool of two that trains by the stand-in, with checkpoints and weights."""

    def __init__(self) -> None:
        super().__init__(lambda job: fake(job)[0])

    def wait(self, timeout: float) -> list[Result]:
        if timeout == 0.0 or not self.jobs:
            return []
        job = self.jobs.pop()
        return [Result(job, *stand_in(job))]


def of_tokens(tokens: int) -> Space:
    """A study of 40 trials by gray_box, with halving, that stops at a number of tokens."""
    text = halving(HALVING, objectives=BOTH).text
    text = text.replace("search: {", f"search: {{stop: {{train_tokens: {tokens}}}, ")
    text = text.replace("sampler: random", "sampler: gray_box").replace("trials: 14", "trials: 40")
    return Space.parse(text, "s.yaml")


def evaluated(study: Study) -> int:
    return sum(map(counts, study.view.evaluations))


def assert_whole(study: Study) -> None:
    """Every rung was trained once, all rows agree, and nothing is left over."""
    study.store.set_trials(study.name, evaluated(study))
    assert_sound(study, evaluated(study))
    assert set(trained().values()) == {1}
    assert not rung_rows.pauses(study.store, study.name)
    assert doctor.examine(study.store, study.name) == []
    assert_no_leftovers(study)


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gray_box, "INITIAL", 3)
    monkeypatch.setattr(gray_box, "DRAWN", 160)
    monkeypatch.setattr(gray_box, "MUTATIONS", 20)


@pytest.mark.usefixtures("small_pools")
def test_a_study_with_rungs_and_asks_ahead_stops_at_its_tokens_and_goes_on() -> None:
    study = run(of_tokens(5_000), pool=Trains())
    assert study.finished == "train_tokens"
    assert spending(study.store, "s").train_tokens == 256 * len(trained())
    # Two that ran and one drawn ahead end at a rung after the budget is used up; then all paused
    # candidates are stopped.
    assert 5_000 <= 256 * len(trained()) <= 5_000 + 256 * 4
    statuses = {e.status for e in study.view.evaluations}
    assert statuses == {"complete", "stopped"}
    assert_whole(study)
    before = evaluated(study)
    more = run(of_tokens(9_000), pool=Trains())
    assert more.finished == "train_tokens"
    assert evaluated(more) > before
    assert_whole(more)


@pytest.mark.usefixtures("small_pools")
def test_gray_box_sees_the_candidates_that_a_study_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, estimated = set[int](), gray_box.GrayBox._estimated

    def spied(self: GrayBox, described: Described, estimate: Estimate | None) -> Evaluated | None:
        evaluated = estimated(self, described, estimate)
        if evaluated is not None:
            seen.update(t for t, e in self.rungs.estimates().items() if e == estimate)
        return evaluated

    monkeypatch.setattr(gray_box.GrayBox, "_estimated", spied)
    study = run(of_tokens(5_000), pool=Trains())
    stopped = {e.trial for e in study.view.evaluations if e.status == "stopped"}
    assert seen & stopped
    # A second run reads the rungs of the first one from the database.
    seen.clear()
    run(of_tokens(9_000), pool=Trains())
    assert seen & stopped


def test_a_study_with_rungs_reuses_what_another_one_trained_to_the_end() -> None:
    first = run(halving(objectives=BOTH), workers="inline")
    second = run(halving(name="t", objectives=BOTH), workers="inline")
    complete = {e.fingerprint for e in first.view.evaluations if e.status == "complete"}
    reused = {e.fingerprint for e in second.view.evaluations if e.reused_from is not None}
    assert reused == complete
    # What the first one stopped is trained again: it has no final loss.
    stopped = {e.fingerprint for e in second.view.evaluations if e.reused_from is None}
    assert stopped == {e.fingerprint for e in first.view.evaluations} - complete
    assert_sound(second, evaluated(first))
    values = {e.fingerprint: e.values for e in first.view.evaluations if e.status == "complete"}
    for evaluation in second.view.evaluations:
        if evaluation.fingerprint in values:
            assert evaluation.values == values[evaluation.fingerprint]
