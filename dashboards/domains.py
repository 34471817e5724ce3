"""Domains by expert."""

from __future__ import annotations

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.records import Evaluation, Plain, View
from moenas.report import figures

READS = "front"
NEEDS = "training"
TITLE = "Domains by expert"
SHOWN = 3
MOST_EXPERTS = 128
"""Of one map: the layers that come first, as many as have so many experts together."""
NAME_LENGTH = 18


def figure(view: View) -> go.Figure:
    """Draw domain by expert for members of the front, the layers side by side."""
    members = [e for e in figures.members(view) if _layers(e)]
    if not members:
        reason = (
            "no candidate is complete yet"
            if not view.front
            else "of no MoE layer on the front are the domains of the text known"
        )
        return figures.blank(TITLE, reason)
    shown = figures.thin(members, SHOWN)
    words = "slots of a domain at an expert, 1 where all experts get an equal share; validation"
    if len(members) > SHOWN:
        words += f"; {SHOWN} of {len(members)} members"
    drawn = make_subplots(
        rows=len(shown),
        cols=1,
        vertical_spacing=0.48 / (len(shown) + 1),
        subplot_titles=[f"trial {e.trial}" for e in shown],
        figure=figures.drawing(TITLE, words),
    )
    for row, evaluation in enumerate(shown, start=1):
        drawn.add_trace(_map(evaluation), row=row, col=1)
        places, texts = _ticks(evaluation)
        drawn.update_xaxes(tickvals=places, ticktext=texts, row=row, col=1)
    drawn.update_xaxes(title_text="layer", row=len(shown), col=1)
    drawn.update_xaxes(showgrid=False, showline=False, ticks="", type="category")
    drawn.update_yaxes(
        autorange="reversed",
        dtick=1,
        showgrid=False,
        showline=False,
        tickfont_size=12 if len(shown) == 1 else 9,
        ticks="",
        type="category",
    )
    drawn.update_annotations(font_size=12)
    drawn.update_layout(coloraxis=figures.load_colours("slots"), margin_t=96)
    return drawn


def _layers(evaluation: Evaluation) -> list[Plain]:
    """Return the rows of the layers whose domains are known, as many as can be shown."""
    shown: list[Plain] = []
    width = 0
    for row in sorted(evaluation.routing, key=lambda row: int(row["layer"])):
        experts = max(map(len, (row.get("domains") or {}).values()), default=0)
        if experts and (not shown or width + experts <= MOST_EXPERTS):
            shown.append(row)
            width += experts
    return shown


def _map(evaluation: Evaluation) -> go.Heatmap:
    """Return the shares; a blank column parts two layers."""
    layers = _layers(evaluation)
    domains = list(dict.fromkeys(name for row in layers for name in row["domains"]))
    names: list[str] = []
    lines: list[list[float | None]] = [[] for _ in domains]
    for i, row in enumerate(layers):
        experts = max(map(len, row["domains"].values()))
        gap = i > 0
        names += [" " * i] * gap + [f"layer {row['layer']}, expert {j}" for j in range(experts)]
        for line, domain in zip(lines, domains, strict=True):
            shares = row["domains"].get(domain) or [None] * experts
            line += [None] * gap + [None if s is None else experts * s for s in shares]
    return go.Heatmap(
        z=[[None if x is None else figures.load_level(x) for x in line] for line in lines],
        x=names,
        y=[_cut(domain) for domain in domains],
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=f"trial {evaluation.trial}, %{{x}}<br>%{{text}} times its even share"
        " of %{y}<extra></extra>",
        text=[["" if x is None else f"{x:.2f}" for x in line] for line in lines],
        xgap=1,
        ygap=1,
    )


def _cut(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def _ticks(evaluation: Evaluation) -> tuple[list[str], list[str]]:
    """Return the expert in the middle of each layer, and the number of the layer."""
    rows = _layers(evaluation)
    sizes = [max(map(len, row["domains"].values())) for row in rows]
    layers = [str(row["layer"]) for row in rows]
    places = [f"layer {n}, expert {(size - 1) // 2}" for n, size in zip(layers, sizes, strict=True)]
    return places, layers
