"""Expert load over training."""

from __future__ import annotations

from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from moenas.records import Evaluation, View
from moenas.report import figures

READS = "front"
NEEDS = "training"
TITLE = "Expert load over training"
READ = 12
"""Members of the front whose curves are read at most."""
SHOWN = 6
COLUMNS = 3
MOST_CELLS = 12_000
"""Of all maps together: experts times points of time. Beyond it points are left out."""
MOST_EXPERTS = 512
"""Of one map: the layers that come first, as many as have so many experts together."""

Column = dict[int, list[float]]
"""Layer -> load of each expert over the balanced load."""


def figure(view: View) -> go.Figure:
    """Draw experts by tokens seen for members of the front, the layers above one another."""
    members = [e for e in figures.members(view) if e.routing]
    shown = figures.thin([e for e in figures.thin(members, READ) if _columns(e, 1)], SHOWN)
    if not shown:
        reason = (
            "no candidate is complete yet"
            if not view.front
            else "of no MoE layer on the front is the load over training known"
        )
        return figures.blank(TITLE, reason)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    words = "share of the slots since the point before, 1 where all experts of a layer get the same"
    if len(members) > len(shown):
        words += f"; {len(shown)} of {len(members)} members"
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
        trial_columns = _columns(evaluation, MOST_CELLS // len(shown))
        drawn.add_trace(_map(evaluation.trial, trial_columns), row=row, col=column)
        last = index + columns >= len(shown)
        drawn.update_xaxes(title_text="tokens" if last else "", row=row, col=column)
        title = "layer" if column == 1 else ""
        drawn.update_yaxes(_layers(trial_columns[0][1]), title_text=title, row=row, col=column)
    drawn.update_xaxes(showgrid=False, tickformat="~s", nticks=5)
    drawn.update_annotations(font_size=12)
    drawn.update_layout(coloraxis=figures.load_colours(), margin_t=96)
    return drawn


def _columns(evaluation: Evaluation, cells: int) -> list[tuple[float, Column]]:
    """Return tokens and loads of the rows of the curve that know them, the layers in order."""
    columns = []
    for row in evaluation.curve:
        layers = {int(r["layer"]): r.get("load") or [] for r in row.get("routing") or []}
        kept: Column = {}
        for layer, load in sorted(layers.items()):
            size = sum(map(len, kept.values())) + len(load)
            if (ratios := figures.load_ratios(load)) and (not kept or size <= MOST_EXPERTS):
                kept[layer] = ratios
        if row.get("tokens") and kept:
            columns.append((float(row["tokens"]), kept))
    height = sum(map(len, columns[0][1].values())) if columns else 1
    return figures.thin(columns, max(2, cells // height))


def _map(trial: int, columns: list[tuple[float, Column]]) -> go.Heatmap:
    """Return the loads; a blank row parts two layers."""
    stacks = [_stack(column) for _, column in columns]
    z = [[stack.get(name) for stack in stacks] for name in stacks[0]]
    return go.Heatmap(
        z=[[None if x is None else figures.load_level(x) for x in line] for line in z],
        x=figures.rounded([tokens for tokens, _ in columns]),
        y=list(stacks[0]),
        coloraxis="coloraxis",
        hoverongaps=False,
        hovertemplate=f"trial {trial}, %{{y}}<br>%{{x:.3s}} tokens: 2 to the %{{z:.2f}} of the"
        " balanced load<extra></extra>",
    )


def _stack(column: Column) -> dict[str, float | None]:
    """Return name of an expert -> its load, with a nameless one before each layer but the first."""
    stack: dict[str, float | None] = {}
    for i, (layer, ratios) in enumerate(column.items()):
        if i:
            stack[" " * i] = None
        stack |= {f"layer {layer}, expert {j}": ratio for j, ratio in enumerate(ratios)}
    return stack


def _layers(column: Column) -> dict[str, Any]:
    """Return an axis with the number of each layer in the middle of its experts."""
    return {
        "autorange": "reversed",
        "showgrid": False,
        "showline": False,
        "ticks": "",
        "tickvals": [f"layer {n}, expert {(len(r) - 1) // 2}" for n, r in column.items()],
        "ticktext": [str(layer) for layer in column],
        "type": "category",
    }
