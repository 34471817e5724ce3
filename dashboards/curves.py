"""Learning curves."""

from __future__ import annotations

import math
from itertools import chain
from statistics import fmean

from plotly import graph_objects as go

from moenas.records import Evaluation, Plain, View
from moenas.report import figures

NEEDS = "training"
TITLE = "Learning curves"
SHOWN_POINTS = 48
SHOWN_OTHERS = 40
READ_OTHERS = 60
"""Curves of others that are read at most: each is a query."""
STATES = {
    "complete": ("dominated", {"color": figures.GREY, "width": 1}),
    "stopped": ("stopped early", {"color": figures.GREY, "width": 1, "dash": "dash"}),
    "failed": ("failed", {"color": figures.VERMILION, "width": 1, "dash": "dot"}),
}
"""Status of a candidate -> name and line of its curves."""
NAMED = len(figures.COLOURS)
"""As many members of the front as there are colours get one and a line in the legend."""

Curve = tuple[list[float], list[float]]


def figure(view: View) -> go.Figure:
    """Draw training loss over tokens; the front in colour, with its validation loss at the end."""
    on_front = set(view.front)
    others = [e for e in view.evaluations if e.trial not in on_front and e.status in STATES]
    members = figures.members(view)
    named = [e for e in figures.thin(members, NAMED) if _points(e)]
    groups = {status: _thinned([e for e in others if e.status == status]) for status in STATES}
    if not named and not any(groups.values()):
        return figures.blank(TITLE, "no candidate has been trained yet")
    shown = sum(map(len, groups.values()))
    drawn = figures.drawing(TITLE, _subtitle(shown, len(others), len(members)))
    for status, (name, line) in STATES.items():
        if groups[status]:
            drawn.add_trace(_crowd(groups[status], name, line))
    for evaluation, colour in zip(named, figures.COLOURS, strict=False):
        _member(drawn, view, evaluation, colour)
    level = figures.bigram_loss(view)
    if level is not None:
        ends = [
            math.log10(t) for e in chain(named, *groups.values()) for t in _curve(e)[0] if t > 0
        ]
        drawn.add_trace(_bigram(level, ends))
    drawn.update_xaxes(title_text="tokens", type="log", tickformat="~s", dtick="D2")
    drawn.update_yaxes(title_text="loss (nats/token)")
    return drawn


def _thinned(group: list[Evaluation]) -> list[Evaluation]:
    """Return some candidates that have a curve; only the curves of a few are read."""
    return figures.thin([e for e in figures.thin(group, READ_OTHERS) if _points(e)], SHOWN_OTHERS)


def _subtitle(n_shown: int, n_others: int, n_members: int) -> str:
    words = ["training loss, averaged between points; a diamond is the validation loss"]
    if n_members > NAMED:
        words.append(f"{NAMED} of the {n_members} on the front are shown")
    if n_others > SHOWN_OTHERS:
        words.append(f"{n_shown} of {n_others} others")
    return "; ".join(words)


def _points(evaluation: Evaluation) -> list[tuple[float, float]]:
    """Return (tokens, training loss) of the rows that have a finite one."""
    points = [(row.get("tokens"), row.get("train_loss")) for row in evaluation.curve]
    return [(t, loss) for t, loss in points if t and loss is not None and math.isfinite(loss)]


def _curve(evaluation: Evaluation) -> Curve:
    """Average a curve over bins that grow with the tokens, as a logarithmic axis shows it."""
    points = _points(evaluation)
    first, last = math.log(points[0][0]), math.log(points[-1][0])
    width = (last - first) / SHOWN_POINTS or 1.0
    bins: dict[int, list[tuple[float, float]]] = {}
    for tokens, loss in points:
        bins.setdefault(math.ceil((math.log(tokens) - first) / width - 1e-9), []).append(
            (tokens, loss)
        )
    return (
        figures.rounded([points_[-1][0] for points_ in bins.values()]),
        figures.rounded([fmean(loss for _, loss in points_) for points_ in bins.values()]),
    )


def _crowd(group: list[Evaluation], name: str, line: Plain) -> go.Scatter:
    """Return the curves of many candidates as one trace, gaps between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    for evaluation in group:
        tokens, losses = _curve(evaluation)
        x += [*tokens, None]
        y += [*losses, None]
    return go.Scatter(
        x=x,
        y=y,
        hoverinfo="skip",
        line=line,
        mode="lines",
        name=name,
        opacity=0.5,
    )


def _member(drawn: go.Figure, view: View, evaluation: Evaluation, colour: str) -> None:
    tokens, losses = _curve(evaluation)
    group = f"trial {evaluation.trial}"
    val_loss = evaluation.metrics.get("val_loss", evaluation.values.get("val_loss"))
    text = figures.hover(view, evaluation)
    drawn.add_scatter(
        x=tokens,
        y=losses,
        hovertemplate="%{x:.3s} tokens, %{y:.4g} nats<br>" + text + "<extra></extra>",
        legendgroup=group,
        line={"color": colour, "width": 2},
        mode="lines",
        name=group if val_loss is None else f"{group}: {val_loss:.3f}",
    )
    if val_loss is not None:
        drawn.add_scatter(
            x=tokens[-1:],
            y=figures.rounded([val_loss]),
            hovertemplate="validation loss %{y:.4g} nats<br>" + text + "<extra></extra>",
            legendgroup=group,
            marker={"color": colour, "size": 10, "symbol": "diamond"},
            mode="markers",
            showlegend=False,
        )


def _bigram(level: float, ends: list[float]) -> go.Scatter:
    return go.Scatter(
        x=[10 ** min(ends), 10 ** max(ends)],
        y=[level, level],
        hovertemplate=f"held-out bigram loss of the corpus, {level:.4g} nats<extra></extra>",
        line={"color": figures.VERMILION, "dash": "dash", "width": 1.5},
        mode="lines",
        name=f"held-out bigram loss: {level:.3f}",
    )
