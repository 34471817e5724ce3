"""What counts as a change of an objective between two runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from studies import ARCHITECTURE, fake, scripted, space

from moenas.former import OBJECTIVE_DIGESTS
from moenas.study.changes import changed_objectives, refuse_changes
from moenas.study.launch import run

pytestmark = pytest.mark.usefixtures("study_folder")


def test_a_study_of_a_former_shipped_objective_goes_on() -> None:
    found = run(space(ARCHITECTURE), trials=1, pool=scripted(lambda job: fake(job)[0]))
    (former,) = OBJECTIVE_DIGESTS["flops_per_token"]
    before = [
        {**info, "sha256": former} if info["name"] == "flops_per_token" else info
        for info in found.record.objectives
    ]
    stored = {**found.record.space, "objectives": [
        {"name": info["name"], "sha256": info["sha256"]} for info in before
    ]}  # fmt: skip
    known = replace(found.record, objectives=before, space=stored, space_sha256="of before")
    assert changed_objectives(known, space(ARCHITECTURE)) == []
    from moenas.evaluate.matching import open_corpus

    assert refuse_changes(known, space(ARCHITECTURE), open_corpus(space(ARCHITECTURE))) == []
    another = [{**info, "sha256": "0" * 64} for info in before]
    changed = changed_objectives(replace(known, objectives=another), space(ARCHITECTURE))
    assert [objective.name for objective in changed] == ["val_loss", "flops_per_token"]
