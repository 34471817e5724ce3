"""Effects of the values of holes, between models of equal active parameters."""

from __future__ import annotations

import math

from plotly import graph_objects as go

from moenas.predict.level_effects import MIN_CANDIDATES, EvaluatedDraws, HoleEffect, hole_effects
from moenas.records import ObjectiveInfo, View
from moenas.report import figures

NEEDS = "training"
TITLE = "Effects of the holes"
SHOWN = 8
"""Holes with the largest effects that are drawn."""
LABEL = 34
"""Characters of the name of a hole that are shown: its end."""


def figure(view: View) -> go.Figure:
    """Draw the effect of each value of the most important holes, with 95 % intervals."""
    info = next((o for o in figures.objectives(view) if o.name == "val_loss"), None)
    info = info or next(iter(figures.objectives(view)))
    rows: EvaluatedDraws = [
        (e, view.params[e.trial])
        for e in figures.complete(view)
        if not e.is_copy and view.params.get(e.trial)
    ]
    effects = hole_effects(rows, info.name) if len(rows) >= MIN_CANDIDATES else []
    if not effects:
        message = f"effects need {MIN_CANDIDATES} complete candidates; there are not so many yet"
        return figures.blank(TITLE, message)
    shown = _largest(effects)
    drawn = figures.drawing(TITLE, _subtitle(info, len(rows), len({e.hole for e in effects})))
    for clear in (True, False):
        drawn.add_trace(_points([e for e in shown if _is_clear(e) is clear], clear, info))
    drawn.add_vline(x=0, line={"color": figures.GREY, "width": 1})
    drawn.update_xaxes(title_text=f"effect on {figures.label(info)}")
    names = [_name(effect) for effect in reversed(shown)]
    drawn.update_yaxes(categoryorder="array", categoryarray=names, tickfont={"size": 10})
    above = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    drawn.update_layout(height=max(360, 150 + 17 * len(shown)), legend=above, margin_t=92)
    return drawn


def _subtitle(info: ObjectiveInfo, n: int, n_holes: int) -> str:
    text = f"mean {info.name} against the mean of all {n} candidates, at equal active parameters"
    return f"{text}; {SHOWN} of {n_holes} holes" if n_holes > SHOWN else text


def _largest(effects: list[HoleEffect]) -> list[HoleEffect]:
    """Return the effects of the holes whose values differ most, the largest first."""
    holes: dict[str, list[HoleEffect]] = {}
    for effect in effects:
        holes.setdefault(effect.hole, []).append(effect)

    def spread(hole: str) -> float:
        sizes = [effect.effect for effect in holes[hole]]
        return min(sizes) - max(sizes)

    chosen = sorted(holes, key=spread)[:SHOWN]
    return [effect for hole in chosen for effect in holes[hole]]


def _is_clear(effect: HoleEffect) -> bool:
    """Whether the interval of an effect leaves out 0."""
    return effect.half_width is not None and abs(effect.effect) > effect.half_width


def _name(effect: HoleEffect) -> str:
    """Return the label of an effect; the start of a long name is left out."""
    hole = effect.hole if len(effect.hole) <= LABEL else f"...{effect.hole[-LABEL:]}"
    return f"{hole}: {effect.level}"


def _points(effects: list[HoleEffect], clear: bool, info: ObjectiveInfo) -> go.Scatter:
    widths = [effect.half_width for effect in effects]
    finite = [0.0 if w is None or not math.isfinite(w) else w for w in widths]
    texts = [
        f"<b>{e.hole}: {e.level}</b><br>{e.effect:+.4g} {info.unit}"
        f"{'' if e.half_width is None else f' +- {e.half_width:.2g}'}<br>{e.n} candidates"
        for e in effects
    ]
    colour = figures.BLUE if clear else figures.GREY
    return go.Scatter(
        x=figures.rounded([effect.effect for effect in effects]),
        y=[_name(effect) for effect in effects],
        error_x={"array": figures.rounded(finite), "thickness": 1.5, "width": 3, "color": colour},
        hovertemplate="%{hovertext}<extra></extra>",
        hovertext=texts,
        marker={"color": colour, "size": 8},
        mode="markers",
        name="interval without 0" if clear else "interval with 0",
    )
