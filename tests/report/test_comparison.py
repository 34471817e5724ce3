"""Two fronts compared, against moocore and a plain definition of dominance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_up_views
import moocore
import numpy as np
import pytest
from stored_studies import shelve

from moenas.errors import InputError
from moenas.report.comparison import comparison_report, comparison_text
from moenas.store.row_readers import as_front


def test_hypervolume_and_dominance_over_the_common_objectives() -> None:
    a, b = as_front(made_up_views.view(30, 4)), as_front(made_up_views.view(20, 3))
    report = comparison_report(a, b)
    names = ["val_loss", "decode_ms", "flops_per_token"]
    assert list(report["objectives"]) == names
    assert (report["only_a"], report["only_b"]) == (["tokens_per_s"], [])
    points = {side: [m for m in report["members"] if m["front"] == side] for side in "ab"}
    corner = [report["reference_point"][name] for name in names]
    for side in "ab":
        values = np.array([[m[name] for name in names] for m in points[side]])
        assert (values <= corner).all()
        expected = moocore.hypervolume(values, ref=corner)
        assert report["hypervolume"][side] == pytest.approx(expected, rel=1e-12)

    def beats(x: dict[str, Any], y: dict[str, Any]) -> bool:
        return all(x[n] <= y[n] for n in names) and any(x[n] < y[n] for n in names)

    for side, other in ("ab", "ba"):
        for m in points[side]:
            assert m["dominates"] == [o["trial"] for o in points[other] if beats(m, o)]
            assert m["dominated_by"] == [o["trial"] for o in points[other] if beats(o, m)]
    text = comparison_text(report)
    assert "only in made_up: tokens_per_s" in text


def test_fronts_without_a_common_objective_or_a_member_are_refused(tmp_path: Path) -> None:
    front = as_front(made_up_views.view(5, 2))
    empty = shelve(tmp_path, made_up_views.view(0, 2, 0)).front_view("made_up")
    with pytest.raises(InputError, match="its front is empty"):
        comparison_report(front, empty)
    for objective in empty.study.objectives:
        objective["name"] += "_other"
    with pytest.raises(InputError, match="have no common objective"):
        comparison_report(front, empty)
