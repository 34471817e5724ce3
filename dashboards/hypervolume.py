"""Hypervolume over trials."""

from __future__ import annotations

from itertools import pairwise

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.pareto import is_exact
from moenas.records import FrontPoint, View
from moenas.report import figures

TITLE = "Hypervolume over trials"
SHOWN = 300


def figure(view: View) -> go.Figure:
    """Draw how much the front dominates after each complete trial, and how many are on it."""
    if not view.history:
        return figures.blank(TITLE, "no candidate is complete yet")
    history = list(enumerate(view.history, start=1))
    shown = figures.thin(_steps(history), SHOWN)
    last = view.history[-1].hypervolume
    drawn = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.7, 0.3],
        vertical_spacing=0.07,
        figure=figures.drawing(TITLE, _subtitle(view)),
    )
    drawn.add_trace(_line(shown, [_share(p.hypervolume, last) for _, p in shown]), row=1, col=1)
    joined = [(n, p) for n, p in shown if p.entered]
    drawn.add_trace(_joined(joined, last), row=1, col=1)
    drawn.add_trace(_line(shown, [p.size for _, p in shown]), row=2, col=1)
    drawn.update_yaxes(title_text="hypervolume (% of the latest)", rangemode="tozero", row=1, col=1)
    drawn.update_yaxes(title_text="on the front", rangemode="tozero", row=2, col=1)
    drawn.update_xaxes(title_text="complete candidates", row=2, col=1)
    drawn.update_layout(showlegend=False)
    return drawn


def _steps(history: list[tuple[int, FrontPoint]]) -> list[tuple[int, FrontPoint]]:
    """Keep the points of a staircase that say something: the changes, the first and the last."""
    kept = [
        here
        for before, here in pairwise(history)
        if (here[1].hypervolume, here[1].size) != (before[1].hypervolume, before[1].size)
    ]
    ends = [history[0], *kept, history[-1]]
    return [point for i, point in enumerate(ends) if i == 0 or point != ends[i - 1]]


def _share(hypervolume: float, last: float) -> float:
    return float(f"{100 * hypervolume / last:.5g}") if last > 0 else 0.0


def _subtitle(view: View) -> str:
    units = {o["name"]: o["unit"] for o in view.study.objectives}
    corner = ", ".join(
        f"{name} {figures.quantity(value, units.get(name, ''))}"
        for name, value in view.study.reference_point.items()
    )
    how = "measured" if is_exact(len(view.study.objectives)) else "approximate, measured"
    return f"{how} from {corner}" if corner else ""


def _line(shown: list[tuple[int, FrontPoint]], y: list[float] | list[int]) -> go.Scatter:
    return go.Scatter(
        x=[n for n, _ in shown],
        y=y,
        hoverinfo="skip",
        line={"color": figures.BLUE, "shape": "hv", "width": 2},
        mode="lines",
    )


def _joined(joined: list[tuple[int, FrontPoint]], last: float) -> go.Scatter:
    """Mark the candidates that joined the front; the hover says whom they pushed out."""
    texts = []
    for _, point in joined:
        out = ", ".join(map(str, point.left))
        text = f"<b>trial {point.trial}</b> joined the front"
        text += f"<br>pushed out {out}" if out else ""
        texts.append(f"{text}<br>{point.size} on it, hypervolume {point.hypervolume:.5g}")
    return go.Scatter(
        x=[n for n, _ in joined],
        y=[_share(point.hypervolume, last) for _, point in joined],
        hovertemplate="%{hovertext}<extra></extra>",
        hovertext=texts,
        marker={"color": figures.BLUE, "size": 7, "line": figures.RIM},
        mode="markers",
    )
