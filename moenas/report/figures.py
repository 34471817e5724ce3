"""Figures of a study: the look that the files of dashboards/ share; all drawn, or on one page."""

from __future__ import annotations

import hashlib
import math
import textwrap
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from plotly import graph_objects as go

from moenas.errors import InputError
from moenas.failures import error_line
from moenas.grammar.summary import compact, one_line
from moenas.records import Evaluation, ObjectiveInfo, View
from moenas.resources import listing, load_module, take

# Okabe and Ito's palette, which colour-blind readers can tell apart. Yellow is left out, because it
# is lost on white paper. Black is left out and blue is lighter, because they are lost on a dark
# page.
BLUE, VERMILION, GREEN = "#2484CE", "#D55E00", "#009E73"
COLOURS = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", "#8C6BB1", "#8A6D3B")
GREY = "#9AA0A6"
"""Everything that is not on the front."""
RIM = {"color": "rgba(255,255,255,0.7)", "width": 0.8}
"""Keeps points apart where many lie together."""
SUBTITLE = 96
"""Characters of a line below a title: what fits a figure of 640 pixels."""
LOG_FROM = 20.0
"""An axis is logarithmic if its largest value is this many times the smallest."""

LOAD_EDGE = 2.0
"""The colours of loads end at 2^-2 and 2^2 times the balanced one."""
LOAD_SCALE = [
    [0.0, "#B35806"],
    [0.25, "#FDB863"],
    [0.5, "#F7F7F7"],
    [0.75, "#B2ABD2"],
    [1.0, "#542788"],
]
"""ColorBrewer's PuOr: two hues that colour-blind readers tell apart, white where balanced."""

ORDER = ("front", "hypervolume", "effects", "curves", "rungs", "load", "routing", "domains")
"""Shipped figures in the order of reading; others follow by name."""

Item = TypeVar("Item")


def drawing(title: str, subtitle: str = "") -> go.Figure:
    """Return an empty figure with the title and the look that all figures share."""
    axis = {
        "automargin": True,
        "gridcolor": "rgba(128,134,139,0.22)",
        "linecolor": "rgba(128,134,139,0.8)",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "rgba(128,134,139,0.8)",
        "ticklen": 4,
        "title": {"standoff": 6},
        "zeroline": False,
    }
    layout: dict[str, Any] = {
        "colorway": list(COLOURS),
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 12, "color": "#30343A"},
        "hoverlabel": {"align": "left", "font": {"size": 12}},
        "hovermode": "closest",
        "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"size": 11}},
        "margin": {"l": 64, "r": 24, "t": 72, "b": 52},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#B6BBC1", "activecolor": "#60666D"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {"x": 0.02, "xanchor": "left", "y": 0.95, "yanchor": "top", "font": {"size": 16}},
        "xaxis": axis,
        "yaxis": axis,
    }
    lines = textwrap.wrap(subtitle, SUBTITLE, break_long_words=False)
    for line in lines:
        title += f"<br><span style='font-size:12px'>{escape(line)}</span>"
    layout["margin"]["t"] += 16 * max(0, len(lines) - 1)
    return go.Figure(layout={"template": {"layout": layout}, "title": {"text": title}})


def blank(title: str, message: str) -> go.Figure:
    """Return a figure that says why there is nothing to draw."""
    figure = drawing(title)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=escape(message), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False
    )
    return figure


def objectives(view: View) -> list[ObjectiveInfo]:
    """Return what the values of the study mean, in order."""
    return [ObjectiveInfo.parse(plain) for plain in view.study.objectives]


def complete(view: View) -> list[Evaluation]:
    """Return the evaluations that have a finite value for every objective, by trial."""
    names = list(view.study.directions)
    evaluations = [
        evaluation
        for evaluation in view.evaluations
        if evaluation.status == "complete"
        and all(math.isfinite(evaluation.values.get(name, math.nan)) for name in names)
    ]
    return sorted(evaluations, key=lambda evaluation: evaluation.trial)


def members(view: View) -> list[Evaluation]:
    """Return the evaluations on the front, in the order of the front."""
    by_trial = {evaluation.trial: evaluation for evaluation in complete(view)}
    return [by_trial[trial] for trial in view.front if trial in by_trial]


def is_trained(view: View) -> bool:
    """Return whether a complete candidate was trained, or none is complete yet."""
    done = complete(view)
    return not done or any(
        e.weights_sha256 is not None or "train" in e.seconds or "val_loss" in e.metrics
        for e in done
    )


def bigram_loss(view: View) -> float | None:
    """Return the held-out bigram loss of the corpus in nats per token, if there are losses.

    A bigram model predicts each token from the previous one. None: it is not known, or the study
    does not train.
    """
    if not is_trained(view):
        return None
    known = view.study.data.get("bigram_loss")
    return float(known) if isinstance(known, int | float) else None


def label(info: ObjectiveInfo, gap: str = " ") -> str:
    """Return the title of an axis: the name of an objective and its unit."""
    return f"{info.name}{gap}({info.unit})" if info.unit else info.name


def quantity(value: float, unit: str = "") -> str:
    """Write a value in few characters with its unit: `1.23M FLOP/token`, `2.314 nats/token`."""
    return f"{compact(value)} {unit}".strip()


def described(view: View, trial: int) -> str:
    """Return the architecture of a trial in one line, or an empty text if it has none."""
    plain = view.architectures.get(trial)
    if plain is None:
        return ""
    try:
        return one_line(plain)
    except (KeyError, TypeError):  # written by a version with other fields
        return str(plain)[:100]


def hover(view: View, evaluation: Evaluation) -> str:
    """Return the trial, its values with units and its architecture, as lines for a hover."""
    lines = [f"<b>trial {evaluation.trial}</b>"]
    for info in objectives(view):
        lines.append(escape(f"{info.name} {quantity(evaluation.values[info.name], info.unit)}"))
    if evaluation.metrics.get("causal") == 0:
        lines.append("NOT CAUSAL: it may look at later tokens")
    words = escape(described(view, evaluation.trial)).replace(", ", ",<br>  ", 1)
    return "<br>".join([*lines, words.replace(" + ", "<br>  + ")])


def rounded(values: Sequence[float]) -> list[float]:
    """Keep five digits: enough for any axis, and the dashboard sends figures on every poll."""
    return [float(f"{value:.5g}") for value in values]


def load_ratios(load: Sequence[float]) -> list[float]:
    """Return the load of each expert over the balanced load; [] if there is none."""
    total = math.fsum(load)
    return [len(load) * share / total for share in load] if total > 0 else []


def load_level(ratio: float) -> float:
    """Return the base-2 logarithm of a load ratio, within the colours."""
    if ratio <= 0:
        return -LOAD_EDGE
    return round(max(-LOAD_EDGE, min(LOAD_EDGE, math.log2(ratio))), 3)


def load_colours(title: str = "load") -> dict[str, Any]:
    """Return the colour axis of load levels."""
    bar = {
        "outlinewidth": 0,
        "thickness": 12,
        "tickvals": [-2, -1, 0, 1, 2],
        "ticktext": ["1/4 or less", "1/2", "1", "2", "4 or more"],
        "title": {"text": f"{title}<br> ", "side": "top"},
    }
    return {"cmin": -LOAD_EDGE, "cmax": LOAD_EDGE, "colorscale": LOAD_SCALE, "colorbar": bar}


def thin(items: Sequence[Item], limit: int) -> list[Item]:
    """Return at most `limit` items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    step = (len(items) - 1) / (limit - 1)
    return [items[round(i * step)] for i in range(limit)]


def is_log(values: Sequence[float]) -> bool:
    """Return whether an axis of these values should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def log_ticks(values: Sequence[float], most: int) -> list[float]:
    """Return at most about `most` round tick values between the ends of a logarithmic axis."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    kept: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        kept = [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1]
        if len(kept) <= most:
            return kept
    return kept[:: -(-len(kept) // most)]


def apart(points: Sequence[tuple[float, float]], gap: tuple[float, float]) -> list[int]:
    """Return the places of points whose texts do not overlap: `gap` is the room of a text.

    Points and gap are shares of the axes. An earlier point keeps its text before a later one.
    """
    kept: list[int] = []
    for i, (x, y) in enumerate(points):
        if all(abs(x - points[j][0]) > gap[0] or abs(y - points[j][1]) > gap[1] for j in kept):
            kept.append(i)
    return kept


def is_near(level: float, values: Sequence[float]) -> bool:
    """Return whether an axis of these values can show `level` too and still show the values."""
    span = max(values) - min(values)
    return min(values) - span <= level <= max(values) + span


def figures(view: View, *, same_front: bool = False) -> dict[str, go.Figure]:
    """Draw every figure of dashboards/, keyed by name; the folder here shadows the shipped one.

    With `same_front` those are left out that say `READS = "front"`: they show members alone. Those
    that say `NEEDS = "training"` are left out of a study that does not train, and those that say
    `NEEDS = "rungs"` of one without results at rungs.

    A file that does not run, or does not give a figure, becomes a figure that says so. A study must
    not end because of a picture.
    """
    files = listing("dashboards", ".py")
    names = [name for name in ORDER if name in files]
    names += [name for name in files if name not in ORDER]
    drawn, trained = {}, is_trained(view)
    for name in names:
        if same_front and _says(files[name], "READS") == "front":
            continue
        needs = _says(files[name], "NEEDS")
        if (needs != "training" or trained) and (needs != "rungs" or view.rungs):
            drawn[name] = _draw(files[name], view)
    return drawn


def _says(path: Path, name: str) -> object:
    """Return a constant of the file of a figure, or None."""
    try:
        return getattr(load_module(take(path, "dashboards")), name, None)
    except Exception:  # drawing it says what is wrong
        return None


def digest() -> str:
    """Name the texts of the figures, so that a changed one is known to be another."""
    hasher = hashlib.sha256()
    for path in listing("dashboards", ".py").values():
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def _draw(path: Path, view: View) -> go.Figure:
    try:
        made = load_module(take(path, "dashboards")).figure(view)
        if not isinstance(made, go.Figure):
            raise InputError(
                f"{path}: figure(view) gave {type(made).__name__}, not a plotly Figure"
            )
        return made
    except InputError as error:
        message = str(error)
    except Exception as error:
        message = f"{path}: {error_line(error)}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return blank(path.stem, message)
