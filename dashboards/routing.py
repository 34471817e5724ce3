"""Expert load over training."""

from __future__ import annotations

from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas import figures
from moenas.records import Evaluation, View

TITLE = "Expert load over training"
SHOWN = 6
COLUMNS = 3
MOST_CELLS = 2400
"""Of one map: experts of all layers times points of time. Beyond it points are left out."""

Column = dict[int, list[float]]
"""Layer -> load of each expert over the balanced load."""


def figure(view: View) -> go.Figure:
    """Draw experts by tokens seen for members of the front, the layers above one another."""
    members = [e for e in figures.members(view) if _columns(e)]
    if not members:
        reason = (
            "no candidate is complete yet"
            if not view.front
            else "of no MoE layer on the front is the load over training known"
        )
        return figures.blank(TITLE, reason)
    shown = figures.thin(members, SHOWN)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    words = "share of the slots since the point before, 1 where all experts of a layer get the same"
    if len(members) > SHOWN:
        words += f"; {SHOWN} of {len(members)} members"
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=0.1,
        vertical_spacing=0.16,
        subplot_titles=[f"trial {e.trial}" for e in shown],
        figure=figures.drawing(TITLE, words),
    )
    for index, evaluation in enumerate(shown):
        row, column = index // columns + 1, index % columns + 1
        drawn.add_trace(_map(evaluation), row=row, col=column)
        last = index + columns >= len(shown)
        drawn.update_xaxes(title_text="tokens" if last else "", row=row, col=column)
        title = "layer" if column == 1 else ""
        drawn.update_yaxes(_layers(evaluation), title_text=title, row=row, col=column)
    drawn.update_xaxes(showgrid=False, tickformat="~s", nticks=5)
    drawn.update_annotations(font_size=12)
    drawn.update_layout(coloraxis=figures.load_colours(), margin_t=96)
    return drawn


def _columns(evaluation: Evaluation) -> list[tuple[float, Column]]:
    """Return tokens and loads of the rows of the curve that know them, the layers in order."""
    found = []
    for row in evaluation.curve:
        layers = {
            int(r["layer"]): figures.load_ratios(r.get("load") or [])
            for r in row.get("routing") or []
        }
        kept = {layer: ratios for layer, ratios in sorted(layers.items()) if ratios}
        if row.get("tokens") and kept:
            found.append((float(row["tokens"]), kept))
    if not found:
        return []
    height = sum(map(len, found[0][1].values()))
    return figures.thin(found, max(2, MOST_CELLS // height))


def _map(evaluation: Evaluation) -> go.Heatmap:
    """Return the loads; a blank row parts two layers."""
    columns = _columns(evaluation)
    names: list[str] = []
    for i, (layer, ratios) in enumerate(columns[0][1].items()):
        names += [""] * (i > 0) + [f"layer {layer}, expert {j}" for j in range(len(ratios))]
    stacks = [_stack(column) for _, column in columns]
    z = [[stack[i] for stack in stacks] for i in range(len(names))]
    return go.Heatmap(
        z=[[None if x is None else figures.load_level(x) for x in line] for line in z],
        x=figures.rounded([tokens for tokens, _ in columns]),
        y=list(range(len(names))),
        coloraxis="coloraxis",
        customdata=[[name] * len(columns) for name in names],
        hoverongaps=False,
        hovertemplate=f"trial {evaluation.trial}, %{{customdata}}<br>%{{x:.3s}} tokens: 2 to the"
        " %{z:.2f} of the balanced load<extra></extra>",
    )


def _stack(column: Column) -> list[float | None]:
    stack: list[float | None] = []
    for i, ratios in enumerate(column.values()):
        stack += [None] * (i > 0) + ratios
    return stack


def _layers(evaluation: Evaluation) -> dict[str, Any]:
    """Return an axis with the number of each layer in the middle of its experts."""
    (_, first), places, start = _columns(evaluation)[0], [], 0
    for ratios in first.values():
        places.append(start + (len(ratios) - 1) / 2)
        start += len(ratios) + 1
    texts = [str(layer) for layer in first]
    return {
        "autorange": "reversed",
        "showgrid": False,
        "showline": False,
        "ticks": "",
        "tickvals": places,
        "ticktext": texts,
    }
