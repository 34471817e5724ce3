"""What the command line prints of a trial and a front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made_up_views
import stored_studies

from moenas.records import View
from moenas.report import summary
from moenas.report.front_report import front_caption


def one(**changes: object) -> View:
    view = made_up_views.view(3, 2, n_failed=0)
    trial = view.front[0]
    changed = [
        replace(e, **changes) if e.trial == trial else e  # type: ignore[arg-type]
        for e in view.evaluations
    ]
    return replace(view, evaluations=changed)


def shown(folder: Path, view: View) -> str:
    store = stored_studies.shelve(folder, view)
    return summary.trial_text(summary.trial_report(store, "made_up", view.front[0]))


def test_a_trial_shows_the_routing_by_layer_expert_and_domain(tmp_path: Path) -> None:
    row = {
        "layer": 4,
        "load": [0.5, 0.25, 0.25, 0.0],
        "max_vio": 1.0,
        "dead": 1,
        "logit_rms": 2.5,
        "domains": {"asyncio": [0.1, 0.2, 0.6, 0.1]},
    }
    text = shown(tmp_path, one(routing=[row]))
    assert "layer 4 routing: max_vio 1, dead 1, logit_rms 2.5\n" in text
    assert "    load by expert, %: 50, 25, 25, 0\n" in text
    assert "    asyncio: expert 2 60 %, expert 1 20 %, expert 0 10 %\n" in text


def test_a_count_is_shown_in_full(tmp_path: Path) -> None:
    text = shown(tmp_path, one(metrics={"train_tokens": 117760.0, "tokens_per_second": 51890.25}))
    assert "  train_tokens: 117,760\n" in text
    assert "  tokens_per_second: 51890\n" in text


def test_layers_of_many_experts_are_cut(tmp_path: Path) -> None:
    text = shown(tmp_path, one(routing=[{"layer": 0, "load": [1 / 64] * 64}]))
    (line,) = [line for line in text.splitlines() if "load by expert" in line]
    assert line.count("1.56") == summary.SHOWN_EXPERTS
    assert line.endswith("and 32 more")


def test_a_loss_that_looks_ahead_is_marked_wherever_it_stands(tmp_path: Path) -> None:
    view = one(
        metrics={"val_loss": 1.0, "causal": 0.0},
        measurements={"val_loss": {"acausal": ["training", "evaluation"]}},
    )
    text = shown(tmp_path, view)
    assert "(NOT CAUSAL: may look at later tokens, and did in training and evaluation)" in text
    caption = front_caption(view)
    assert (
        f"not causal (`allow_acausal`), so their losses are not comparable: {view.front[0]}"
        in caption
    )
    assert not any("later tokens" in line for line in front_caption(one()))
