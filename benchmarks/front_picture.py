"""The picture of the README: the front of a study, with short names of its models.

`make transcripts` draws it. `python benchmarks/front_picture.py FOLDER` draws it again from the
study `tiny` in the database of a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from picture import save
from plotly import graph_objects as go

from moenas.records import Plain, View
from moenas.report import figures
from moenas.store.store import Store

PICTURE = Path(__file__).parents[1] / "docs" / "front.png"
SIZE = 800, 460
"""Width and height in CSS pixels; a README page shows 800."""
Box = tuple[float, float, float, float]
CHARACTER, LINE, GAP = 0.0115, 0.05, 0.02
"""Width of a character and height of a line of a name, and its distance to the point, in shares of
the axes."""
POINT = 0.001
"""The area that a covered point counts as."""
SWEEPS = 10
PLACES = ("top right", "bottom left", "bottom right", "top left")
LOSS, COMPUTE, LATENCY = "val_loss", "flops_per_token", "decode_ms"


def short_name(architecture: Plain) -> str:
    """Return the width, the depth and the feed-forward layer of a model in a few words."""
    layers = sum(group["repeat"] for group in architecture["blocks"])
    ffn = architecture["blocks"][0]["ffn"]
    words = "dense"
    if ffn["kind"] == "moe":
        words = f"moe {ffn['n_experts']}e top{ffn['router']['top_k']}"
    return f"{layers} x {architecture['d_model']}d, {words}"


def scaled(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points in shares of their range; equal values are 0."""
    low = [min(values) for values in zip(*points, strict=True)]
    span = [max(values) - min(values) or 1.0 for values in zip(*points, strict=True)]
    return [((x - low[0]) / span[0], (y - low[1]) / span[1]) for x, y in points]


def placed(names: list[str], spots: list[tuple[float, float]]) -> list[str]:
    """Return where each name stands beside its point: where it covers the least.

    `spots` are all points in shares of the axes; the first ones have the names.
    """
    options = [
        {place: box(name, spot, place) for place in PLACES}
        for name, spot in zip(names, spots, strict=False)
    ]
    places = [PLACES[0]] * len(names)
    for i in [*reversed(range(len(names)))] * SWEEPS:  # each name in turn moves to its best place
        others = [options[j][place] for j, place in enumerate(places) if j != i]
        places[i] = min(PLACES, key=lambda place: covered(options[i][place], others, spots))
    return places


def box(name: str, spot: tuple[float, float], place: str) -> Box:
    """Return the sides of a name beside a point: left, right, bottom, top."""
    width, (x, y) = CHARACTER * len(name), spot
    left = x - GAP - width if place.endswith("left") else x + GAP
    bottom = y - GAP - LINE if place.startswith("bottom") else y + GAP
    return left, left + width, bottom, bottom + LINE


def covered(one: Box, others: list[Box], spots: list[tuple[float, float]]) -> float:
    """Return how much a name covers: the area of other names, points, and what is cut off."""
    left, right, bottom, top = one
    points = sum(left < x < right and bottom < y < top for x, y in spots)
    area = sum(
        max(0.0, min(right, o[1]) - max(left, o[0])) * max(0.0, min(top, o[3]) - max(bottom, o[2]))
        for o in others
    )
    cut = max(0.0, -0.05 - left, right - 1.05, -0.1 - bottom)
    return area + POINT * points + cut


def front_figure(view: View) -> go.Figure:
    """Draw loss over FLOPs; colours give the latency.

    The line joins the members that no other candidate beats in loss and FLOPs. The other members
    are on the front because of their latency.
    """
    members = sorted(figures.members(view), key=lambda e: e.values[COMPUTE])
    on_front = set(view.front)
    dominated = [e for e in figures.complete(view) if e.trial not in on_front]
    best = [
        e for i, e in enumerate(members)
        if all(e.values[LOSS] < other.values[LOSS] for other in members[:i])
    ]  # fmt: skip
    names = [f" {e.trial}: {short_name(view.architectures[e.trial])}" for e in members]
    spots = scaled([(e.values[COMPUTE], e.values[LOSS]) for e in [*members, *dominated]])
    infos = {info.name: info for info in figures.objectives(view)}
    drawn = go.Figure()
    drawn.add_scatter(
        x=[e.values[COMPUTE] for e in dominated],
        y=[e.values[LOSS] for e in dominated],
        marker={"color": figures.GREY, "size": 7, "opacity": 0.45},
        mode="markers",
        name="dominated",
    )
    drawn.add_scatter(
        x=[e.values[COMPUTE] for e in best],
        y=[e.values[LOSS] for e in best],
        line={"color": figures.BLUE, "width": 2, "shape": "hv"},
        mode="lines",
        name="best loss for the FLOPs",
    )
    drawn.add_scatter(
        x=[e.values[COMPUTE] for e in members],
        y=[e.values[LOSS] for e in members],
        marker={
            "color": [e.values[LATENCY] for e in members],
            "colorbar": {"title": {"text": figures.label(infos[LATENCY], "<br>")}, "len": 0.75},
            "colorscale": "Viridis",
            "line": {"color": "white", "width": 1},
            "size": 13,
        },
        mode="markers+text",
        name="Pareto front (trial: layers x width)",
        text=names,
        textfont={"size": 12, "color": "#333333"},
        textposition=placed(names, spots),
    )
    drawn.update_xaxes(title_text=figures.label(infos[COMPUTE]), tickformat="~s", gridcolor="#eee")
    drawn.update_yaxes(title_text=figures.label(infos[LOSS]), gridcolor="#eee", automargin=True)
    drawn.update_layout(
        font={"family": "DejaVu Sans, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 70, "r": 10, "t": 50, "b": 55},
        plot_bgcolor="white",
    )
    return drawn


def draw(folder: Path) -> None:
    """Draw the front of the study `tiny` of a folder into docs/front.png."""
    view = Store.open(f"sqlite:///{folder / 'moenas.db'}").view("tiny")
    save(front_figure(view), SIZE, PICTURE)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
