"""The shipped figures: what they show of a study, and that no study is too strange for them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import made_up_views
import plotly.io
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moenas.records import Evaluation, RungResult, View
from moenas.report import figures
from moenas.resources import load_module, shipped

NAMES = {"front", "hypervolume", "effects", "curves", "load", "routing", "domains"}
"""Figures of a study without early stopping."""
MAX_BYTES = 200_000
"""The dashboard sends every figure whole at every poll."""


def drawn(name, view):
    return load_module(shipped("dashboards") / f"{name}.py").figure(view)


def named(figure, name):
    return [trace for trace in figure.data if (trace.name or "").startswith(name)]


def texts(figure):
    return json.dumps(figure.to_plotly_json(), default=str)


def without_moe(view):
    return replace(view, evaluations=[replace(e, routing=[]) for e in view.evaluations])


STRANGE = {
    "empty": made_up_views.view(0, n_failed=0),
    "failures only": made_up_views.view(0, n_failed=4),
    "one trial": made_up_views.view(1, n_failed=0),
    "one objective": made_up_views.view(12, 1),
    "two objectives": made_up_views.view(12, 2),
    "three objectives": made_up_views.view(12, 3),
    "four objectives": made_up_views.view(12, 4),
    "five objectives": made_up_views.view(12, 5),
    "no MoE": without_moe(made_up_views.view(12)),
    "no data known": made_up_views.view(12, data={}),
    "no curves": replace(
        made_up_views.view(6),
        evaluations=[replace(e, curve=[]) for e in made_up_views.view(6).evaluations],
    ),
    "a single point of a curve": replace(
        made_up_views.view(6),
        evaluations=[replace(e, curve=e.curve[:1]) for e in made_up_views.view(6).evaluations],
    ),
    "nothing moves": replace(
        made_up_views.view(6),
        history=[replace(p, hypervolume=0.0) for p in made_up_views.view(6).history],
    ),
    "routing of an older version": replace(
        made_up_views.view(6),
        evaluations=[
            replace(
                e,
                routing=[{"layer": r["layer"], "load": r["load"]} for r in e.routing],
                curve=[{k: v for k, v in row.items() if k != "routing"} for row in e.curve],
            )
            for e in made_up_views.view(6).evaluations
        ],
    ),
    "no load at all": replace(
        made_up_views.view(6),
        evaluations=[
            replace(
                e,
                routing=[{"layer": 0, "load": [0.0, 0.0], "domains": {}}],
                curve=[{"tokens": 9, "routing": [{"layer": 0, "load": [0.0, 0.0]}]}],
            )
            for e in made_up_views.view(6).evaluations
        ],
    ),
    "replicates of trials that are gone": replace(
        made_up_views.view(6), replicates=[replace(made_up_views.view(1).evaluations[0], trial=99)]
    ),
    "no architectures": replace(made_up_views.view(6), architectures={}),
    "a guest's architecture": replace(
        made_up_views.view(6), architectures={i: {"width": 3} for i in range(20)}
    ),
}


@pytest.mark.parametrize("view", STRANGE.values(), ids=STRANGE)
def test_every_study_gives_all_figures_with_titles_that_plotly_accepts(view):
    made = figures.figures(view)
    assert set(made) == NAMES
    for figure in made.values():
        assert figure.layout.title.text
        again = plotly.io.from_json(figure.to_json())
        assert again.to_plotly_json() == json.loads(figure.to_json())


@pytest.mark.parametrize("name", [*sorted(NAMES), "rungs"])
def test_a_figure_of_an_empty_study_says_why_it_is_empty(name):
    figure = drawn(name, made_up_views.view(0, n_failed=0))
    assert not figure.data
    assert "yet" in figure.layout.annotations[0].text


def test_figures_of_a_large_study_stay_small():
    for n_objectives in (2, 4):
        for name, figure in figures.figures(made_up_views.view(800, n_objectives)).items():
            assert len(figure.to_json()) < MAX_BYTES, (name, n_objectives)


# --- front -------------------------------------------------------------------------------------


def test_the_front_shows_each_pair_and_every_complete_candidate_once_in_each():
    view = made_up_views.view(40, 3)
    figure = drawn("front", view)
    members, others = named(figure, "on the front"), named(figure, "dominated")
    assert len(members) == len(others) == 3
    values = {e.trial: e.values for e in view.evaluations if e.status == "complete"}
    losses = [values[trial]["val_loss"] for trial in view.front]
    assert list(members[0].x) == pytest.approx(losses, rel=1e-4)
    assert len(others[0].x) == len(values) - len(view.front)
    titles = texts(figure)
    for info in figures.objectives(view):
        assert info.name in titles
        assert f"({info.unit})" in titles


def test_failed_and_infeasible_candidates_are_not_on_the_front_figure():
    view = made_up_views.view(5, 2, n_failed=3)
    figure = drawn("front", view)
    members, others = named(figure, "on the front"), named(figure, "dominated")
    assert len(members[0].x) + len(others[0].x) == 5
    incomplete = replace(view.evaluations[0], values={"val_loss": math.nan, "decode_ms": 1.0})
    less = replace(view, evaluations=[incomplete, *view.evaluations[1:]])
    figure = drawn("front", less)
    members, others = named(figure, "on the front"), named(figure, "dominated")
    assert len(members[0].x) + len(others[0].x) == 4


def test_a_hover_on_the_front_has_the_trial_the_units_and_the_architecture():
    view = made_up_views.view(20, 2)
    texts_ = named(drawn("front", view), "on the front")[0].hovertext
    assert len(texts_) == len(view.front)
    for trial, text in zip(view.front, texts_, strict=True):
        assert f"trial {trial}<" in text
        assert "nats/token" in text
        assert "ms/token" in text
        assert "attention 3q/1kv" in text


def replicated(n_objectives: int) -> View:
    """A study in which each member has two further seeds, of other losses."""
    view = made_up_views.view(20, n_objectives)
    by_trial = {e.trial: e for e in view.evaluations}
    again = [
        replace(e, seed=seed, values=e.values | {"val_loss": e.values["val_loss"] + gap})
        for e in (by_trial[trial] for trial in view.front)
        for seed, gap in ((1, 0.01), (2, 0.03))
    ]
    return replace(view, replicates=again)


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_members_with_further_seeds_have_the_mean_and_its_95_percent_interval(n_objectives):
    view = replicated(n_objectives)
    members = {e.trial: e for e in figures.members(view)}
    # SciPy's t interval of the mean of two, with the deviation pooled over three seeds of each.
    squares = sum(
        sum((gap - 0.04 / 3) ** 2 for gap in (0, 0.01, 0.03)) for _ in range(len(members))
    )
    degrees = 2 * len(members)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(squares / degrees / 2)
    traces = named(drawn("front", view), "mean over seeds")
    with_loss = [trace for trace in traces if trace.error_x.array or trace.error_y.array]
    assert len(with_loss) == len(traces) == {1: 1, 2: 1, 3: 2}[n_objectives]
    for trace in traces:
        places, bars = (trace.x, trace.error_x) if trace.error_x.array else (trace.y, trace.error_y)
        wanted = [e.values["val_loss"] + 0.02 for e in members.values()]
        assert list(places) == pytest.approx(wanted, rel=1e-4)
        assert list(bars.array) == pytest.approx([half] * len(members), rel=1e-4)
        for trial, text in zip(members, trace.hovertext, strict=True):
            assert f"<b>trial {trial}</b>" in text
            assert "+-" in text


def test_the_legend_names_the_intervals_if_the_first_pair_has_none():
    view = replicated(3)
    last = sorted(view.study.objectives, key=lambda info: info["name"] == "val_loss")
    traces = drawn("front", replace(view, study=replace(view.study, objectives=last))).data
    shown = [trace.name for trace in traces if trace.showlegend and trace.legendgroup]
    assert [info["name"] for info in last] == ["decode_ms", "flops_per_token", "val_loss"]
    assert sorted(shown) == sorted({trace.name for trace in traces if trace.legendgroup})
    assert shown.count("mean over seeds, 95 % interval") == 1


def test_without_further_seeds_the_front_has_no_intervals():
    equal = replicated(2)
    same = [
        replace(row, values=next(e for e in equal.evaluations if e.trial == row.trial).values)
        for row in equal.replicates
    ]
    for view in (made_up_views.view(20), replace(equal, replicates=same)):
        assert named(drawn("front", view), "mean over seeds") == []


def test_a_hover_says_that_a_model_may_look_ahead():
    view = made_up_views.view(20, 2)
    marked = [replace(e, metrics=e.metrics | {"causal": 0.0}) for e in view.evaluations[:1]]
    marked += [replace(e, metrics=e.metrics | {"causal": 1.0}) for e in view.evaluations[1:]]
    hovers = [figures.hover(view, e) for e in marked if e.status == "complete"]
    assert ["NOT CAUSAL" in hover for hover in hovers] == [True] + [False] * 19


def test_the_entropy_of_the_corpus_is_a_dashed_line_across_the_loss_alone():
    view = made_up_views.view(40, 3)
    shapes = drawn("front", view).layout.shapes
    assert {shape.line.dash for shape in shapes} == {"dash"}
    assert [(shape.x0, shape.x1) for shape in shapes] == [(2.4, 2.4), (2.4, 2.4)]
    assert named(drawn("front", view), "held-out bigram loss, 2.4 nats")
    assert not drawn("front", replace(view, study=replace(view.study, data={}))).layout.shapes


def test_an_entropy_far_from_the_losses_does_not_squeeze_them():
    view = made_up_views.view(40, 2, data={"bigram_loss": 80.0})
    assert not drawn("front", view).layout.shapes
    assert named(drawn("front", view), "held-out bigram loss, 80 nats")


def test_wide_objectives_have_logarithmic_axes():
    view = made_up_views.view(60, 2)
    wide = [replace(e, values={k: v**9 for k, v in e.values.items()}) for e in view.evaluations]
    assert drawn("front", view).layout.xaxis.type == "linear"
    assert drawn("front", replace(view, evaluations=wide)).layout.xaxis.type == "log"


SIGNS = st.tuples(*[st.sampled_from(["minimize", "maximize"])] * 2)
POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(POINTS, SIGNS)
def test_the_envelope_is_the_border_of_what_the_members_dominate(points, directions):
    view = made_up_views.view(0, 2, n_failed=0)
    objectives = [
        {**o, "direction": d} for o, d in zip(view.study.objectives, directions, strict=True)
    ]
    names = [o["name"] for o in objectives]
    evaluations = [
        Evaluation("s", i, 1, "complete", "f", values=dict(zip(names, map(float, p), strict=True)))
        for i, p in enumerate(points)
    ]
    study = replace(view.study, objectives=objectives)
    everyone = list(range(len(points)))
    figure = drawn("front", replace(view, study=study, evaluations=evaluations, front=everyone))
    line = named(figure, "best of the pair")[0]
    signs = [1 if d == "minimize" else -1 for d in directions]
    mine = [(signs[0] * x, signs[1] * y) for x, y in points]
    corners = [(signs[0] * x, signs[1] * y) for x, y in zip(line.x, line.y, strict=True)]

    def beaten(p):
        return any(a <= p[0] and b <= p[1] and (a, b) != p for a, b in mine)

    assert corners[::2] == sorted({p for p in mine if not beaten(p)})
    for (x0, y0), (x1, y1) in pairwise(corners):
        assert (x0 == x1) != (y0 == y1)  # a step goes along one axis


def test_one_objective_gives_the_best_so_far_in_its_direction():
    for direction, best in (("minimize", min), ("maximize", max)):
        view = made_up_views.view(15, 1)
        study = replace(
            view.study, objectives=[{**view.study.objectives[0], "direction": direction}]
        )
        line = named(drawn("front", replace(view, study=study)), "best so far")[0]
        losses = [e.values["val_loss"] for e in view.evaluations if e.status == "complete"]
        expected = [best(losses[: i + 1]) for i in range(len(losses))]
        assert list(line.y) == pytest.approx(expected, rel=1e-4)


# --- hypervolume, curves, load -----------------------------------------------------------------


def test_the_hypervolume_ends_at_a_hundred_per_cent_and_shows_who_joined():
    view = made_up_views.view(50)
    volume, joined, size = drawn("hypervolume", view).data
    assert volume.y[-1] == 100
    assert list(volume.y) == sorted(volume.y)
    assert volume.x[-1] == 50
    assert size.y[-1] == len(view.front)
    assert len(joined.x) == sum(point.entered for point in view.history)
    assert "val_loss 3 nats/token" in texts(drawn("hypervolume", view))


def test_a_member_s_curve_ends_at_its_validation_loss():
    view = made_up_views.view(8, 2)
    figure = drawn("curves", view)
    evaluations = {e.trial: e for e in view.evaluations}
    ends = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(ends) == min(len(view.front), len(figures.COLOURS))
    for end in ends:
        evaluation = evaluations[int(end.legendgroup.split()[1])]
        assert end.y[0] == pytest.approx(evaluation.metrics["val_loss"], rel=1e-4)
        assert end.x[0] == evaluation.curve[-1]["tokens"]


def test_a_curve_keeps_its_mean_and_drops_what_is_not_finite():
    view = made_up_views.view(6, 2, n_failed=1)
    level = [{"tokens": 100 * (i + 1), "train_loss": 3.0 + (-1) ** i} for i in range(2000)]
    level[7] = {"tokens": 800, "train_loss": math.inf}
    flat = [replace(e, curve=level) if e.status == "complete" else e for e in view.evaluations]
    figure = drawn("curves", replace(view, evaluations=flat))
    line = next(t for t in figure.data if t.mode == "lines" and t.name.startswith("trial"))
    assert len(line.x) < 60
    assert line.y[-1] == pytest.approx(3.0, abs=0.05)
    failed = named(figure, "failed")[0]
    assert [y for y in failed.y if y is not None][-1] == pytest.approx(6.9, abs=0.1)


def test_the_curves_have_the_entropy_of_the_corpus():
    assert named(drawn("curves", made_up_views.view(8)), "held-out bigram loss: 2.4")
    assert not named(drawn("curves", made_up_views.view(8, data={})), "held-out bigram loss")


def routed(loads):
    view = made_up_views.view(1, 2, n_failed=0)
    rows = [{"layer": layer, "load": load} for layer, load in loads.items()]
    return replace(view, evaluations=[replace(view.evaluations[0], routing=rows)])


def test_the_load_map_is_one_where_experts_get_the_same_and_two_for_twice_that():
    (heat,) = drawn("load", routed({0: [5.0] * 4, 2: [2.0, 1.0, 1.0, 0.0]})).data
    assert list(heat.y) == ["0", "2"]
    assert [list(row) for row in heat.z] == [[0, 0, 0, 0], [1, 0, 0, -2]]  # base-2 logarithms
    assert list(heat.text[1]) == ["2.00", "1.00", "1.00", "0.00"]


def test_the_load_map_does_not_depend_on_how_many_tokens_were_counted():
    one = drawn("load", routed({0: [0.5, 0.3, 0.2]}))
    many = drawn("load", routed({0: [500.0, 300.0, 200.0]}))
    assert one.to_json() == many.to_json()


def test_layers_with_other_numbers_of_experts_leave_gaps():
    (heat,) = drawn("load", routed({0: [1.0, 1.0], 1: [1.0, 1.0, 1.0]})).data
    assert [list(row) for row in heat.z] == [[0, 0, None], [0, 0, 0]]


def test_each_member_with_experts_has_a_map_under_its_number():
    view = made_up_views.view(20, 2)
    figure = drawn("load", view)
    titles = [note.text for note in figure.layout.annotations]
    evaluations = {e.trial: e for e in view.evaluations}
    assert titles == [f"trial {t}" for t in view.front if evaluations[t].routing]
    assert "no MoE" in drawn("load", without_moe(view)).layout.annotations[0].text


# --- routing over training, domains --------------------------------------------------------------


def test_the_load_over_training_is_by_layer_and_expert_with_a_gap_between_layers():
    view = made_up_views.view(1, 2, n_failed=0)
    curve = [
        {"tokens": 100, "routing": [{"layer": 2, "load": [3, 1]}, {"layer": 0, "load": [1, 1, 1]}]},
        {"tokens": 150, "train_loss": 3.0},
        {"tokens": 200, "routing": [{"layer": 2, "load": [0, 4]}, {"layer": 0, "load": [2, 1, 0]}]},
    ]
    one = replace(view, evaluations=[replace(view.evaluations[0], curve=curve)])
    figure = drawn("routing", one)
    (heat,) = figure.data
    assert list(heat.x) == [100, 200]
    levels = [[0, 1], [0, 0], [0, -2], [None, None], [0.585, -2], [-1, 1]]
    assert [list(line) for line in heat.z] == levels
    experts = ["layer 0, expert 0", "layer 0, expert 1", "layer 0, expert 2"]
    assert list(heat.y) == [*experts, " ", "layer 2, expert 0", "layer 2, expert 1"]
    assert list(figure.layout.yaxis.tickvals) == [experts[1], "layer 2, expert 0"]
    assert list(figure.layout.yaxis.ticktext) == ["0", "2"]


@pytest.mark.parametrize("name", ["routing", "domains", "load"])
def test_maps_of_many_experts_stay_small(name):
    view = made_up_views.view(12, 2, n_failed=0)
    layers = [{"layer": i, "load": [1.37 ** (j % 7) for j in range(256)]} for i in range(6)]
    shares = {f"a package {i}": [1 / 256] * 256 for i in range(9)}
    changes = {
        "curve": [{"tokens": 10 * (i + 1), "routing": layers} for i in range(40)],
        "routing": [row | {"domains": shares} for row in layers],
    }
    many = replace(view, evaluations=[replace(e, **changes) for e in view.evaluations])
    assert len(drawn(name, many).to_json()) < MAX_BYTES


def test_domains_are_one_where_they_go_to_all_experts_alike():
    view = made_up_views.view(1, 2, n_failed=0)
    rows = [
        {"layer": 3, "load": [1], "domains": {"b": [0.25, 0.75], "a": [0.5, 0.5]}},
        {"layer": 1, "load": [1], "domains": {"a": [0.0, 1.0, 0.0]}},
        {"layer": 0, "load": [1]},
    ]
    one = replace(view, evaluations=[replace(view.evaluations[0], routing=rows)])
    figure = drawn("domains", one)
    (heat,) = figure.data
    assert list(heat.y) == ["a", "b"]
    assert [list(line) for line in heat.z] == [
        [-2, 1.585, -2, None, 0, 0],
        [None, None, None, None, -1, 0.585],
    ]
    assert heat.text[1][4] == "0.50"
    assert list(heat.x)[2:5] == ["layer 1, expert 2", " ", "layer 3, expert 0"]
    assert list(figure.layout.xaxis.tickvals) == ["layer 1, expert 1", "layer 3, expert 0"]
    assert list(figure.layout.xaxis.ticktext) == ["1", "3"]


def test_domains_of_many_experts_show_the_first_layers():
    view = made_up_views.view(1, 2, n_failed=0)
    rows = [{"layer": i, "load": [1], "domains": {"a": [1 / 60] * 60}} for i in range(9)]
    one = replace(view, evaluations=[replace(view.evaluations[0], routing=rows)])
    assert list(drawn("domains", one).layout.xaxis.ticktext) == ["0", "1"]


@pytest.mark.parametrize("name", ["routing", "domains"])
def test_each_shown_member_with_experts_has_a_map(name):
    view = made_up_views.view(20, 2)
    module = load_module(shipped("dashboards") / f"{name}.py")
    titles = [note.text for note in module.figure(view).layout.annotations]
    evaluations = {e.trial: e for e in view.evaluations}
    routed_ = [t for t in view.front if evaluations[t].routing]
    assert titles == [f"trial {t}" for t in figures.thin(routed_, module.SHOWN)]
    none = replace(
        without_moe(view), evaluations=[replace(e, routing=[], curve=[]) for e in view.evaluations]
    )
    assert "no MoE layer" in drawn(name, none).layout.annotations[0].text


# --- what the figures share --------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 50))
def test_thinning_keeps_both_ends_and_the_order(n, limit):
    kept = figures.thin(range(n), limit)
    assert len(kept) == min(n, limit)
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, n - 1)


def test_a_quantity_has_its_unit_and_few_characters():
    assert figures.quantity(2.31456, "nats/token") == "2.315 nats/token"
    assert figures.quantity(1_234_567, "FLOP/token") == "1.23M FLOP/token"
    assert figures.quantity(0.000123) == "0.000123"


def test_a_figure_here_shadows_the_shipped_one_and_more_can_be_added(tmp_path, monkeypatch):
    folder = tmp_path / "dashboards"
    folder.mkdir()
    source = '"""Mine."""\nfrom moenas.report.figures import blank\ndef figure(view):\n    return '
    (folder / "front.py").write_text(source + "blank('mine', 'hello')\n")
    (folder / "another.py").write_text(source + "blank('other', 'hello')\n")
    monkeypatch.chdir(tmp_path)
    made = figures.figures(made_up_views.view(3))
    shipped_ = ["front", "hypervolume", "effects", "curves", "load", "routing", "domains"]
    assert list(made) == [*shipped_, "another"]
    assert made["front"].layout.title.text == "mine"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def figure(view):\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def figure(view):\n    return {}\n", "not a plotly Figure"),
        ("def figure(view:\n", "bad.py:1"),
        ("x = 1\n", "figure"),
    ],
)
def test_a_figure_that_fails_says_so_in_its_place(tmp_path, monkeypatch, source, reason):
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards" / "bad.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="bad.py"):
        made = figures.figures(made_up_views.view(3))
    assert set(made) == NAMES | {"bad"}
    assert reason in made["bad"].layout.annotations[0].text


def untrained(view: View) -> View:
    """The same study, had it measured costs and latencies alone."""
    bare: dict[str, Any] = {"curve": [], "routing": [], "metrics": {}, "weights_sha256": None}
    rows = [replace(e, **bare, seconds={"total": 1.0}) for e in view.evaluations]
    return replace(view, evaluations=rows)


def test_a_study_without_training_has_no_figures_of_training() -> None:
    view = untrained(made_up_views.view(30, 4, n_failed=0))
    assert list(figures.figures(view)) == ["front", "hypervolume"]
    assert figures.bigram_loss(view) is None
    assert len(figures.figures(made_up_views.view(30, 4))) == 7
    assert len(figures.figures(made_up_views.view(0))) == 7, "training may begin yet"


def test_trial_numbers_of_points_close_together_do_not_overlap() -> None:
    points = [(0.0, 0.0), (0.05, 0.05), (0.5, 0.0), (0.05, 0.9)]
    assert figures.apart(points, (0.1, 0.1)) == [0, 2, 3]
    for trace in drawn("front", made_up_views.view(12, 4)).data:
        if trace.text is not None:
            assert any(trace.text)
            assert len(trace.text) == len(trace.x)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (90, 2100, [100, 300, 1000]),
        (1.1e4, 1.4e6, [1e4, 1e5, 1e6]),
        (1, 1e9, [1, 1e3, 1e6, 1e9]),
    ],
)
def test_a_small_logarithmic_axis_has_few_round_ticks(
    low: float, high: float, ticks: list[float]
) -> None:
    assert figures.log_ticks([low, high], 4) == pytest.approx(ticks)


def test_a_long_subtitle_is_broken_into_lines_above_the_plot() -> None:
    short, long = figures.drawing("a", "word"), figures.drawing("a", "word " * 60)
    assert long.layout.title.text.count("<br>") == 4
    gap = long.layout.template.layout.margin.t - short.layout.template.layout.margin.t
    assert gap == 3 * 16


def searched(n: int = 40) -> View:
    """A made-up study with parameters that say something, and three rungs that rank better."""
    view, rng = made_up_views.view(n), random.Random(1)
    params, evaluations, results = {}, [], []
    for e in view.evaluations:
        if e.status != "complete":
            evaluations.append(e)
            continue
        kind, width = rng.choice(["dense", "moe"]), rng.choice([64, 96, 128])
        params[e.trial] = {"blocks.0.ffn": kind, "d_model": width}
        loss = 3 + 0.4 * (kind == "dense") + rng.gauss(0, 0.02)
        known = {"values": {**e.values, "val_loss": loss}, "metrics": {"val_loss": loss}}
        evaluations.append(replace(e, **known))
        for rung, noise in enumerate((0.4, 0.1, 0.01), start=1):
            early = 3 + loss / rung + rng.gauss(0, noise)
            results.append(RungResult(e.trial, rung, 4096 * 2**rung, early, promoted=rung < 3))
    return replace(view, evaluations=evaluations, params=params, rungs=results)


def test_a_study_with_rungs_has_their_figure():
    assert list(figures.figures(searched())) == list(figures.ORDER)


def test_the_agreement_of_rungs_is_scipys_correlation():
    view = searched()
    line = drawn("rungs", view).data[0]
    final = {e.trial: e.metrics["val_loss"] for e in view.evaluations if e.values}
    for rung, shown in enumerate(line.y, start=1):
        results = [r for r in view.rungs if r.rung == rung]
        pairs = [(r.val_loss, final[r.trial]) for r in results]
        assert shown == pytest.approx(stats.spearmanr(pairs).statistic, abs=1e-4)
    assert line.y[0] < line.y[-1]
    assert list(line.x) == ["8.19k", "16.4k", "32.8k"]
    bars = {trace.name: list(trace.y) for trace in drawn("rungs", view).data[1:]}
    assert bars == {"trained on": [40, 40, 0], "stopped or paused": [0, 0, 40]}


def test_the_effects_are_those_that_were_put_in():
    figure = drawn("effects", searched())
    points = {name: x for trace in figure.data for name, x in zip(trace.y, trace.x, strict=True)}
    difference = points["blocks.0.ffn: dense"] - points["blocks.0.ffn: moe"]
    assert difference == pytest.approx(0.4, abs=0.05)
    (clear,) = named(figure, "interval without 0")
    assert set(clear.y) >= {"blocks.0.ffn: dense", "blocks.0.ffn: moe"}
    assert {"d_model: 64", "d_model: 96", "d_model: 128"} <= set(points)
