"""The page and the picture of the search benchmark, from its stored results."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from scipy.stats import mannwhitneyu, t

Array = NDArray[np.float64]
Results = dict[str, Any]
"""What `search.py` stores: facts on the table, and a list of runs."""

OURS = "moenas"
"""Beginning of the names of our methods; the others are rivals, random search too."""
FROM = 10
"""Percent of the budget from which on rivals are compared by a test."""
LEVEL = 0.05
"""Probability of error of the test, for each point of the curve."""
SHOWN = (10, 25, 50, 100)
"""Percents of the budget in the tables."""
SIZE = 960, 480
"""Pixels of the picture."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
           "#9c6b4e", "#9498a0", "#1b1b1b", "#c9a227", "#7a0177")  # fmt: skip

HEAD = """\
# Search methods compared on recorded evaluations

`python benchmarks/search.py --page` writes this page. Each method searches the table of
[benchmarks/moe_table](../benchmarks/moe_table/README.md), in simulated time with real
evaluations. The objectives are `val_loss` and `flops_per_token`. The share is the hypervolume of
what was found, in units of the true front's. Training FLOPs are counted, also those of candidates
that are stopped early. The budget is the training of so many candidates of mean size;
{predicted:.1%} of the points were not trained, and their losses are predicted.

The true front holds expected losses, so a lucky seed is worth nothing. They come from a linear
model of all choices and their pairs; losses that are left out of it are {judge_error:.4f} nats
away from it. The model shares no code with the surrogate of `gray_box`.

- **share at x %**: mean over the seeds after x % of the budget, with the half width of its 95 %
  interval.
- **compute to random**: compute until the mean curve reaches what random search has at the end of
  the budget, relative to the budget.
- **compute to rival**: the same for what the best rival has at its end.
- **worse**: points of the curve, from {first} % of the budget on, at which the best rival there
  is better at the level of {level:.0%} (Mann-Whitney U test).

![Share of the true hypervolume against training compute](search.png)
"""


def curves(results: Results, workers: int) -> dict[str, Array]:
    """Return method -> curves (seeds, points) of a number of workers."""
    found: dict[str, list[list[float]]] = {}
    for run in results["runs"]:
        if run["workers"] == workers:
            found.setdefault(run["method"], []).append(run["curve"])
    return {name: np.array(rows) for name, rows in sorted(found.items())}


def half_width(values: Array) -> float:
    """Return the half width of the 95 % interval of a mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def compute_to(curve: Array, share: float) -> float:
    """Return the part of the budget after which a curve reaches a share; infinite if never."""
    reached = np.flatnonzero(curve >= share)
    return float(reached[0] + 1) / len(curve) if len(reached) else float("inf")


def rivals(found: dict[str, Array]) -> dict[str, Array]:
    """Return the curves of the methods that are not ours."""
    return {name: rows for name, rows in found.items() if not name.startswith(OURS)}


def worse(mine: Array, others: dict[str, Array]) -> int:
    """Return the number of points from FROM % on at which the best rival is better by the test."""
    points = mine.shape[1]
    count = 0
    for i in range(points * FROM // 100 - 1, points):
        best = max(others.values(), key=lambda rows: float(rows[:, i].mean()))
        if best[:, i].mean() > mine[:, i].mean():
            test = mannwhitneyu(best[:, i], mine[:, i], alternative="greater")
            count += bool(test.pvalue < LEVEL)
    return count


def tables(results: Results) -> Iterator[str]:
    """Yield the lines of the tables, one for each number of workers."""
    for workers in sorted({run["workers"] for run in results["runs"]}):
        found = curves(results, workers)
        others = rivals(found)
        finals = {name: float(rows[:, -1].mean()) for name, rows in others.items()}
        best = max(finals, key=finals.__getitem__) if finals else ""
        yield f"## {workers} workers, budget {results['budgets'][str(workers)]} mean candidates"
        yield ""
        if finals:
            yield f"The best rival at the end of the budget is {best}."
            yield ""
        heads = [f"share at {percent} %" for percent in SHOWN]
        rest = ["compute to random", "compute to rival", "worse", "seeds"]
        yield f"| method | {' | '.join([*heads, *rest])} |"
        yield "|" + " --- |" * (1 + len(heads) + len(rest))
        for name, rows in found.items():
            at = [rows[:, rows.shape[1] * percent // 100 - 1] for percent in SHOWN]
            cells = [f"{one.mean():.4f} +- {half_width(one):.4f}" for one in at]
            mean = rows.mean(axis=0)
            cells += [
                f"{compute_to(mean, finals[key]):.2f}" if key in finals else ""
                for key in ("random", best)
            ]
            points = rows.shape[1] - rows.shape[1] * FROM // 100 + 1
            counts = name not in others and others
            cells += [f"{worse(rows, others)} of {points}" if counts else "", str(len(rows))]
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""


def figure(results: Results) -> go.Figure:
    """Return mean curves of all methods with their 95 % bands, a panel a number of workers."""
    numbers = sorted({run["workers"] for run in results["runs"]})
    names = sorted({run["method"] for run in results["runs"]})
    titles = [f"{number} workers" for number in numbers]
    drawn = make_subplots(cols=len(numbers), subplot_titles=titles, shared_yaxes=True)
    for column, number in enumerate(numbers, 1):
        budget = results["budgets"][str(number)]
        for name, rows in curves(results, number).items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            x = budget * np.arange(1, rows.shape[1] + 1) / rows.shape[1]
            y = 1 - rows.mean(axis=0)
            drawn.add_scatter(
                x=x, y=y, name=name, legendgroup=name, showlegend=column == 1, row=1, col=column,
                line={"color": colour, "width": 3 if name.startswith(OURS) else 1.5,
                      "dash": "dot" if "," in name else "solid"},
            )  # fmt: skip
        drawn.update_xaxes(title="training compute, mean candidates", row=1, col=column)
    drawn.update_yaxes(type="log")
    drawn.update_yaxes(title="share of the hypervolume that is missing", row=1, col=1)
    drawn.update_layout(
        template="simple_white", margin={"l": 70, "r": 10, "t": 40, "b": 50},
        legend={"font": {"size": 11}},
    )  # fmt: skip
    return drawn


def write(results: Results, folder: Path) -> None:
    """Write the page and the picture into a folder; the picture needs Chromium."""
    head = HEAD.format(**results, first=FROM, level=LEVEL)
    text = "\n".join([head, *tables(results)])
    (folder / "search_benchmark.md").write_text(text, encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("the picture needs Chromium; install it, or leave the picture as it is")
    width, height = SIZE
    with tempfile.TemporaryDirectory() as place:
        page = Path(place, "search.html")
        figure(results).write_html(
            page,
            default_width=f"{width - 20}px",
            default_height=f"{height - 20}px",
            config={"displayModeBar": False},
        )
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--screenshot={folder / 'search.png'}", f"--window-size={width},{height}",
             "--virtual-time-budget=8000", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
