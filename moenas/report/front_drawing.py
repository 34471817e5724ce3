"""The front as a drawing that needs neither a network nor a script, for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 280
"""Pixels of the drawing."""
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 14, 40
"""Pixels around the plot, for the labels."""
INK, LINE = "#2484CE", "#9AA0A6"
INHERITED = 'fill="currentColor"'
"""Labels have the colour of the text around the drawing, light or dark."""


def front_svg(points: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Draw trials and their values by the first two objectives; nothing if there is one alone.

    A point shows its trial and its values when the pointer is over it. The ends of an axis are the
    smallest and the largest value. A line joins the points of a front of two objectives.
    """
    if len(names) < 2 or not points:
        return ""
    y_name, x_name = names[0], names[1]
    across = _scale([values[x_name] for _, values in points], LEFT, WIDTH - RIGHT)
    up = _scale([values[y_name] for _, values in points], HEIGHT - BOTTOM, TOP)
    placed = sorted((across(v[x_name]), up(v[y_name]), trial, v) for trial, v in points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
    line = f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-opacity="0.4"/>'
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{INK}"><title>'
        + escape(", ".join([f"trial {trial}", *(f"{n} {values[n]:.5g}" for n in names)]))
        + "</title></circle>"
        for x, y, trial, values in placed
    ]
    frame = f"M{LEFT - 10},{TOP} V{HEIGHT - BOTTOM + 10} H{WIDTH - RIGHT}"
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"',
            ' role="img" aria-label="Pareto front" font-family="sans-serif" font-size="11">',
            f'<path d="{frame}" fill="none" stroke="{LINE}"/>',
            line if len(names) == 2 else "",
            *marks,
            *_labels(points, x_name, y_name),
            "</svg>",
        ]
    )


def _scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Return what maps values to pixels, from the smallest at `start` to the largest at `end`."""
    low, span = min(values), max(values) - min(values)
    return lambda value: start + (end - start) * ((value - low) / span if span else 0.5)


def _labels(
    points: Sequence[tuple[int, Mapping[str, float]]], x_name: str, y_name: str
) -> list[str]:
    """Return the names of both objectives, and the ends of their axes."""
    xs, ys = ([values[name] for _, values in points] for name in (x_name, y_name))
    base, middle = HEIGHT - BOTTOM + 24, (TOP + HEIGHT - BOTTOM) / 2
    texts = [
        (LEFT, base, "middle", f"{min(xs):.4g}"),
        (WIDTH - RIGHT, base, "end", f"{max(xs):.4g}"),
        ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", x_name),
        (LEFT - 14, HEIGHT - BOTTOM + 4, "end", f"{min(ys):.4g}"),
        (LEFT - 14, TOP + 4, "end", f"{max(ys):.4g}"),
    ]
    lines = [
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {INHERITED}>{escape(text)}</text>'
        for x, y, anchor, text in texts
    ]
    turned = f'transform="translate(14,{middle:g}) rotate(-90)" text-anchor="middle"'
    return [*lines, f"<text {turned} {INHERITED}>{escape(y_name)}</text>"]
