"""Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, combinations
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.records import Evaluation, ObjectiveInfo, View
from moenas.report import figures
from moenas.report.seed_report import seed_intervals

TITLE = "Pareto front"
SHOWN_OBJECTIVES = 4
"""Six pairs of objectives are what a page holds."""
SHOWN_DOMINATED, SHOWN_MEMBERS = 500, 360
"""Points in all plots together: each has a hover, and the dashboard sends figures at every poll."""
NUMBERED = 12
"""A front of at most so many members has the trial numbers beside its points."""
TEXT = {1: (0.04, 0.04), 3: (0.1, 0.1), 6: (0.17, 0.1)}
"""Number of plots -> width and height of a trial number, as shares of the axes of one."""
TICKS = {1: 8, 3: 5, 6: 4}
"""Number of plots -> ticks of a logarithmic axis."""

BELOW = {"orientation": "h", "x": 0.02, "y": 0.01, "yref": "container", "yanchor": "bottom"}
"""A legend beside the subtitle would lie over it on a narrow page."""
CORNER = {"x": 0.58, "y": 0.36, "yanchor": "top"}
"""Three pairs leave a quarter of the page to the legend."""

BIGRAM_LINE = {"color": figures.VERMILION, "dash": "dash", "width": 1.2}
"""A model that knows only the previous token reaches this loss."""

BARS = {"color": figures.GREEN, "thickness": 1, "width": 3}
"""Intervals of means over seeds."""

Pair = tuple[ObjectiveInfo, ObjectiveInfo]


def figure(view: View) -> go.Figure:
    """Draw each pair of objectives: dominated points, members of the front and their envelope.

    Members that were trained with further seeds have their mean and its interval, too.
    """
    infos = figures.objectives(view)
    if not figures.complete(view):
        return figures.blank(TITLE, "no candidate is complete yet")
    if len(infos) == 1:
        return _best_so_far(view, infos[0])
    pairs = list(combinations(infos[:SHOWN_OBJECTIVES], 2))
    columns = {1: 1, 3: 2, 6: 3}[len(pairs)]
    drawn = figures.drawing(TITLE, _subtitle(view))
    drawn = make_subplots(
        rows=-(-len(pairs) // columns),
        cols=columns,
        horizontal_spacing=0.16,
        vertical_spacing=0.22,
        figure=drawn,
    )
    named: set[str] = set()  # a legend has one entry for the traces of all pairs
    for index, pair in enumerate(pairs):
        row, column = index // columns + 1, index % columns + 1
        for trace in _traces(view, pair, share=len(pairs)):
            shown = bool(len(trace.x)) and trace.legendgroup not in named
            if shown:
                named.add(trace.legendgroup)
            drawn.add_trace(trace.update(showlegend=shown), row=row, col=column)
        _axes(drawn, view, pair, (row, column))
    level = figures.bigram_loss(view)
    if level is not None and "val_loss" in view.study.directions:
        drawn.add_trace(_bigram_key(level), row=1, col=1)
    if len(pairs) == 3:
        drawn.update_layout(legend=CORNER)
    else:
        drawn.update_layout(legend=BELOW, margin_b=92)
    return drawn


def _subtitle(view: View) -> str:
    words = [f"{len(view.front)} of {len(figures.complete(view))} complete candidates are on it"]
    n_objectives = len(view.study.objectives)
    n_pairs = math.comb(min(n_objectives, SHOWN_OBJECTIVES), 2)
    if len(view.front) > SHOWN_MEMBERS // n_pairs:
        words.append(f"{SHOWN_MEMBERS // n_pairs} of them are shown")
    if n_objectives > SHOWN_OBJECTIVES:
        words.append(f"first {SHOWN_OBJECTIVES} of {n_objectives} objectives")
    return "; ".join(words)


def _traces(view: View, pair: Pair, *, share: int) -> list[go.Scatter]:
    """Return the dominated points, the envelope and the members of one of `share` pairs."""
    x, y = pair
    members = figures.members(view)
    on_front = set(view.front)
    others = [e for e in figures.complete(view) if e.trial not in on_front]
    others = figures.thin(others, SHOWN_DOMINATED // share)
    step_x, step_y = _envelope(members, pair)
    members = figures.thin(members, SHOWN_MEMBERS // share)
    intervals = _intervals(view, members, pair)
    numbers = _numbers(view, members, pair, share) if len(members) <= NUMBERED else None
    return [
        go.Scatter(
            **_xy(others, pair),
            customdata=[[e.trial, figures.described(view, e.trial)] for e in others],
            hovertemplate=f"trial %{{customdata[0]}}<br>{x.name} %{{x}}<br>{y.name} %{{y}}"
            "<br>%{customdata[1]}<extra></extra>",
            legendgroup="dominated",
            marker={"color": figures.GREY, "size": 6, "opacity": 0.55},
            mode="markers",
            name="dominated",
        ),
        go.Scatter(
            x=step_x,
            y=step_y,
            hoverinfo="skip",
            legendgroup="envelope",
            line={"color": figures.BLUE, "width": 1.5},
            mode="lines",
            name="best of the pair",
        ),
        go.Scatter(
            **_xy(members, pair),
            cliponaxis=False,
            hovertemplate="%{hovertext}<extra></extra>",
            hovertext=[figures.hover(view, e) for e in members],
            legendgroup="front",
            marker={"color": figures.BLUE, "size": 9, "line": figures.RIM},
            mode="markers+text" if numbers else "markers",
            name="on the front (trial)" if numbers else "on the front",
            text=numbers,
            textfont={"size": 10},
            textposition="top right",
        ),
        *([intervals] if intervals else []),
    ]


def _intervals(
    view: View, members: list[Evaluation], pair: tuple[ObjectiveInfo | None, ObjectiveInfo]
) -> go.Scatter | None:
    """Return the means over seeds of replicated members, with their 95 % intervals.

    An axis without an objective is that of the trial numbers. None: nothing differs between seeds.
    """
    by_trial = seed_intervals(view)
    shown = [(e, by_trial[e.trial]) for e in members if by_trial.get(e.trial)]
    noisy = {name for _, intervals in shown for name in intervals}
    if not any(info and info.name in noisy for info in pair):
        return None
    bars: dict[str, Any] = {}
    for axis, info in zip("xy", pair, strict=True):
        if info is None:
            bars[axis] = [e.trial for e, _ in shown]
            continue
        own = [intervals.get(info.name, (e.values[info.name], 0.0)) for e, intervals in shown]
        bars[axis] = figures.rounded([mean for mean, _ in own])
        if info.name in noisy:
            halves = figures.rounded([half for _, half in own])
            bars[f"error_{axis}"] = {"type": "data", "array": halves, **BARS}
    return go.Scatter(
        **bars,
        hovertemplate="%{hovertext}<extra></extra>",
        hovertext=[
            "<br>".join(
                [f"<b>trial {e.trial}</b>, mean over seeds"]
                + [
                    f"{name} {figures.quantity(mean)} +- {figures.quantity(half)}"
                    for name, (mean, half) in intervals.items()
                ]
            )
            for e, intervals in shown
        ],
        legendgroup="seeds",
        marker={"color": figures.GREEN, "size": 6, "symbol": "diamond-open"},
        mode="markers",
        name="mean over seeds, 95 % interval",
    )


def _numbers(view: View, members: list[Evaluation], pair: Pair, share: int) -> list[str]:
    """Return the trial numbers to write beside members; none where two would overlap."""
    width, height = TEXT[share]
    scaled = []
    for info in pair:
        values = [e.values[info.name] for e in figures.complete(view)]
        scale = math.log if figures.is_log(values) else float
        low, high = scale(min(values)), scale(max(values))
        scaled.append([(scale(e.values[info.name]) - low) / (high - low or 1) for e in members])
    kept = figures.apart(list(zip(*scaled, strict=True)), (width, height))
    return [str(e.trial) if i in kept else "" for i, e in enumerate(members)]


def _xy(evaluations: list[Evaluation], pair: Pair) -> dict[str, list[float]]:
    x, y = pair
    return {
        "x": figures.rounded([e.values[x.name] for e in evaluations]),
        "y": figures.rounded([e.values[y.name] for e in evaluations]),
    }


def _envelope(members: list[Evaluation], pair: Pair) -> tuple[list[float], list[float]]:
    """Return the corners of the staircase through the members that no other beats in this pair."""
    signs = [1.0 if info.direction == "minimize" else -1.0 for info in pair]
    points = sorted(
        tuple(sign * e.values[info.name] for sign, info in zip(signs, pair, strict=True))
        for e in members
    )
    corners: list[tuple[float, float]] = []
    for x, y in points:
        if not corners:
            corners.append((x, y))
        elif y < corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return (
        figures.rounded([signs[0] * x for x, _ in corners]),
        figures.rounded([signs[1] * y for _, y in corners]),
    )


def _axes(drawn: go.Figure, view: View, pair: Pair, place: tuple[int, int]) -> None:
    """Name and scale the axes of one pair and draw the corpus's entropy beside the loss."""
    row, col = place
    x, y = ([e.values[info.name] for e in figures.complete(view)] for info in pair)
    ticks = TICKS[math.comb(min(len(view.study.objectives), SHOWN_OBJECTIVES), 2)]
    _axis(drawn.update_xaxes, pair[0], x, ticks, row=row, col=col)
    _axis(drawn.update_yaxes, pair[1], y, ticks, row=row, col=col)
    if len(view.study.objectives) > 2:  # these plots are low, and the names are long
        drawn.update_yaxes(title_text=figures.label(pair[1], "<br>"), row=row, col=col)
    level = figures.bigram_loss(view)
    if level is not None and pair[0].name == "val_loss" and figures.is_near(level, x):
        drawn.add_vline(level, line=BIGRAM_LINE, row=row, col=col)
        drawn.add_trace(_room(level, y[0]), row=row, col=col)
    if level is not None and pair[1].name == "val_loss" and figures.is_near(level, y):
        drawn.add_hline(level, line=BIGRAM_LINE, row=row, col=col)
        drawn.add_trace(_room(x[0], level), row=row, col=col)


def _axis(
    update: Callable[..., Any],
    info: ObjectiveInfo,
    values: list[float],
    ticks: int = 8,
    **place: int,
) -> None:
    is_log = figures.is_log(values)
    update(
        title_text=figures.label(info),
        type="log" if is_log else "linear",
        tickvals=figures.log_ticks(values, ticks) if is_log else None,
        nticks=ticks + 1,
        tickformat="~s" if max(map(abs, values)) >= 1e4 else None,
        **place,
    )


def _room(x: float, y: float) -> go.Scatter:
    """Return a point that is not seen: the axes keep some distance to points, not to lines."""
    marker = {"opacity": 0, "size": 10}
    return go.Scatter(
        x=[x], y=[y], hoverinfo="skip", marker=marker, mode="markers", showlegend=False
    )


def _bigram_key(level: float) -> go.Scatter:
    """Return the entry of the legend that explains the dashed line."""
    name = f"held-out bigram loss, {level:.3g} nats"
    return go.Scatter(x=[None], y=[None], line=BIGRAM_LINE, mode="lines", name=name)


def _best_so_far(view: View, info: ObjectiveInfo) -> go.Figure:
    """Draw one objective over the trials, with the best value so far."""
    rows = figures.complete(view)
    values = figures.rounded([e.values[info.name] for e in rows])
    better = min if info.direction == "minimize" else max
    best = list(accumulate(values, better))
    shown = figures.thin(range(len(rows)), SHOWN_DOMINATED)
    drawn = figures.drawing(f"Best {info.name}", "one objective: the front is the best candidate")
    drawn.add_scatter(
        x=[rows[i].trial for i in shown],
        y=[values[i] for i in shown],
        hovertemplate="%{hovertext}<extra></extra>",
        hovertext=[figures.hover(view, rows[i]) for i in shown],
        marker={"color": figures.GREY, "size": 6},
        mode="markers",
        name="candidates",
    )
    drawn.add_scatter(
        x=[rows[i].trial for i in shown],
        y=[best[i] for i in shown],
        hoverinfo="skip",
        line={"color": figures.BLUE, "shape": "hv"},
        name="best so far",
    )
    if intervals := _intervals(view, figures.members(view), (None, info)):
        drawn.add_trace(intervals)
    _axis(drawn.update_yaxes, info, values)
    drawn.update_xaxes(title_text="trial")
    drawn.update_layout(legend=BELOW, margin_b=92)
    return drawn
