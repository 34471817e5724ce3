"""Expert load by layer."""

from __future__ import annotations

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.records import Evaluation, Plain, View
from moenas.report import figures

READS = "front"
NEEDS = "training"
TITLE = "Expert load by layer"
SHOWN = 12
COLUMNS = 3
WHOLE = {"showgrid": False, "showline": False, "ticks": "", "type": "category"}
"""An axis of names: layers and experts are not quantities."""


def figure(view: View) -> go.Figure:
    """Draw layer by expert for each member of the front; 1 is the load of perfect balance."""
    members = [e for e in figures.members(view) if any(map(_ratios, e.routing))]
    if not members:
        reason = (
            "no candidate is complete yet" if not view.front else "no MoE layer is on the front"
        )
        return figures.blank(TITLE, reason)
    shown = figures.thin(members, SHOWN)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    words = "share of the validation tokens, 1 where all experts get the same"
    if len(members) > SHOWN:
        words += f"; {SHOWN} of {len(members)} members"
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=0.09,
        vertical_spacing=0.16 if len(shown) <= 6 else 0.11,
        subplot_titles=[f"trial {e.trial}" for e in shown],
        figure=figures.drawing(TITLE, words),
    )
    for index, evaluation in enumerate(shown):
        row, column = index // columns + 1, index % columns + 1
        drawn.add_trace(_map(evaluation), row=row, col=column)
        drawn.update_xaxes(title_text="expert" if row == rows else "", row=row, col=column)
        drawn.update_yaxes(title_text="layer" if column == 1 else "", row=row, col=column)
    drawn.update_xaxes(**WHOLE)
    drawn.update_yaxes(**WHOLE, autorange="reversed")
    drawn.update_annotations(font_size=12)
    drawn.update_layout(coloraxis=figures.load_colours(), margin_t=96)
    return drawn


def _ratios(row: Plain) -> list[float]:
    """Return the load of each expert of a layer over the balanced load; [] if it has none."""
    return figures.load_ratios(row.get("load") or [])


def _map(evaluation: Evaluation) -> go.Heatmap:
    layers = {int(row["layer"]): _ratios(row) for row in evaluation.routing if _ratios(row)}
    width = max(map(len, layers.values()))
    z = [
        [*map(figures.load_level, ratios), *[None] * (width - len(ratios))]
        for ratios in layers.values()
    ]
    text = [[f"{ratio:.2f}" for ratio in ratios] for ratios in layers.values()]
    return go.Heatmap(
        z=z,
        x=list(range(width)),
        y=[str(layer) for layer in layers],
        coloraxis="coloraxis",
        hovertemplate=f"trial {evaluation.trial}, layer %{{y}}, expert %{{x}}"
        "<br>%{text} of the balanced load<extra></extra>",
        text=text,
        xgap=1,
        ygap=1,
    )
