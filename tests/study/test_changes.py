"""What counts as a change of an objective between two runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from studies import ARCHITECTURE, fake, scripted, space

from moenas.errors import InputError
from moenas.former import OBJECTIVE_DIGESTS
from moenas.space.space import Space
from moenas.study.changes import changed_objectives, refuse_changes
from moenas.study.launch import dry_run, run
from moenas.study.maintenance import stored_space

pytestmark = pytest.mark.usefixtures("study_folder")


def test_a_study_of_a_former_shipped_objective_goes_on() -> None:
    study = run(space(ARCHITECTURE), trials=1, pool=scripted(lambda job: fake(job)[0]))
    (former,) = OBJECTIVE_DIGESTS["flops_per_token"]
    before = [
        {**info, "sha256": former} if info["name"] == "flops_per_token" else info
        for info in study.record.objectives
    ]
    stored = {**study.record.space, "objectives": [
        {"name": info["name"], "sha256": info["sha256"]} for info in before
    ]}  # fmt: skip
    known = replace(study.record, objectives=before, space=stored, space_sha256="of before")
    assert changed_objectives(known, space(ARCHITECTURE)) == []
    from moenas.evaluate.matching import open_corpus

    assert refuse_changes(known, space(ARCHITECTURE), open_corpus(space(ARCHITECTURE))) == []
    another = [{**info, "sha256": "0" * 64} for info in before]
    changed = changed_objectives(replace(known, objectives=another), space(ARCHITECTURE))
    assert [objective.name for objective in changed] == ["val_loss", "flops_per_token"]


def test_a_study_that_began_with_another_default_sampler_keeps_it() -> None:
    named = space()
    unnamed = Space.parse(named.text.replace(", sampler: tpe", ""), "s.yaml")
    assert (named.names_sampler, unnamed.names_sampler) == (True, False)
    assert unnamed.search.sampler == "gray_box"
    pool = scripted(lambda job: fake(job)[0])
    run(named, trials=3, pool=pool)
    assert dry_run(unnamed, trials=4).candidates == 1
    study = run(unnamed, trials=4, pool=pool)
    assert len([e for e in study.view.evaluations if not e.is_copy]) == 4
    assert study.record.space["search"]["sampler"] == "tpe"
    with pytest.raises(InputError, match=r'search\.sampler: "tpe" -> "random"'):
        run(named.with_search(sampler="random"), trials=5, pool=pool)
    run(replace(named.with_search(sampler="random"), name="drawn"), trials=1, pool=pool)
    with pytest.raises(InputError, match=r'search\.sampler: "random" -> "gray_box"'):
        run(replace(unnamed, name="drawn"), trials=2, pool=pool)
    # A new study has the default of today.
    assert run(
        replace(unnamed, name="new"), trials=2, pool=pool
    ).record.space["search"]["sampler"] == "gray_box"  # fmt: skip


def test_a_study_that_began_with_another_default_lr_scale_keeps_it() -> None:
    """Earlier versions had the default 1, which did not follow the batch."""
    unnamed, pool = space(), scripted(lambda job: fake(job)[0])
    assert not unnamed.names_lr_scale
    assert unnamed.train.lr_scale is None
    run(replace(unnamed, train=replace(unnamed.train, lr_scale=1.0)), trials=1, pool=pool)
    study = run(unnamed, trials=2, pool=pool)
    assert study.record.space["train"]["lr_scale"] == 1.0
    assert stored_space(study.record).train.lr_scale == 1.0
    named = Space.parse(unnamed.text, "s.yaml", ["train.lr_scale=2"])
    with pytest.raises(InputError, match=r"train\.lr_scale: 1\.0 -> 2\.0"):
        run(named, trials=3, pool=pool)
    # A value that the study had and its file has no more is a change.
    halved = replace(unnamed, name="halved", train=replace(unnamed.train, lr_scale=0.5))
    run(halved, trials=1, pool=pool)
    with pytest.raises(InputError, match=r"train\.lr_scale: 0\.5 -> null"):
        run(replace(unnamed, name="halved"), trials=2, pool=pool)
    # A new study follows the batch.
    fresh = run(replace(unnamed, name="new"), trials=1, pool=pool)
    assert fresh.record.space["train"]["lr_scale"] is None


def test_a_stored_study_without_a_named_sampler_is_read_with_its_own() -> None:
    named = space()
    unnamed = Space.parse(named.text.replace(", sampler: tpe", ""), "s.yaml")
    study = run(unnamed, trials=2, pool=scripted(lambda job: fake(job)[0]))
    before = {**study.record.space, "search": {**study.record.space["search"], "sampler": "tpe"}}
    assert stored_space(replace(study.record, space=before)).search.sampler == "tpe"
    assert stored_space(study.record).search.sampler == "gray_box"
