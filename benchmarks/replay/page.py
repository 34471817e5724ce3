"""The page and the picture of the search benchmark, from its stored results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from picture import save
from plotly.subplots import make_subplots
from replay import draws
from replay.simulate import FREE_REPEATS
from replay.table import RUNGS, Table
from scipy.stats import mannwhitneyu, t

from moenas.predict.rank_agreement import spearman

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
LEAST = 5
"""Seeds below which a method is not shown."""
SIZE = 960, 480
"""Pixels of the picture."""
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5",
           "#9c6b4e", "#9498a0", "#1b1b1b", "#c9a227", "#7a0177")  # fmt: skip

HEAD = """\
# Search methods compared on recorded evaluations

`python benchmarks/search.py --page` writes this page. Each method searches the table of
[benchmarks/moe_table](../benchmarks/moe_table/README.md), in simulated time with real
evaluations. The objectives are `val_loss` and `flops_per_token`. The share is the hypervolume of
the front so far, in units of the true front's. Training FLOPs are counted, also of candidates that
are stopped early. The budget is the training of so many candidates of mean size; {predicted:.1%} of
the points were not trained, and their losses are predicted.

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
- **filled**: share of the candidates that were drawn at random because the method repeated itself.
- **limit**: the hypervolume of all models whose training can have ended by then. No method reaches
  more: a large model takes long, and with 256 workers that is a large part of the budget.

A sampler that proposes an architecture again is told the known values, at no cost. After
{free_repeats} repeats in a row, the worker trains a new architecture that is drawn at random. A
curve that stays level belongs to a method that has stopped all other points. Optuna's GP sampler is
not run: it takes about a minute for 40 candidates.

A comma in a name separates what is added or left out:

- **halving**, **predictive**: with that rule of early stopping.
- **costs unknown**: `gray_box` predicts FLOPs too, and does not read them.
- **repeats trained**: a repeated proposal is trained again, as without the evaluation cache.

![Share of the true hypervolume against training compute](search.png)
"""


def curves(results: Results, workers: int) -> dict[str, Array]:
    """Return method -> curves (seeds, points) of a number of workers; LEAST seeds or more."""
    by_method: dict[str, list[list[float]]] = {}
    for run in results["runs"]:
        if run["workers"] == workers:
            by_method.setdefault(run["method"], []).append(run["curve"])
    return {n: np.array(rows) for n, rows in sorted(by_method.items()) if len(rows) >= LEAST}


def half_width(values: Array) -> float:
    """Return the half width of the 95 % interval of a mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def compute_to(curve: Array, share: float) -> float:
    """Return the part of the budget after which a curve reaches a share; infinite if never."""
    reached = np.flatnonzero(curve >= share - 1e-12)  # two ways to take a mean round differently
    return float(reached[0] + 1) / len(curve) if len(reached) else float("inf")


def rivals(by_method: dict[str, Array]) -> dict[str, Array]:
    """Return the curves of the methods that are not ours, without variants of them."""
    return {n: rows for n, rows in by_method.items() if not n.startswith(OURS) and "," not in n}


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
        by_method = curves(results, workers)
        others = rivals(by_method)
        finals = {name: float(rows[:, -1].mean()) for name, rows in others.items()}
        best = max(finals, key=finals.__getitem__) if finals else ""
        yield f"## {workers} workers, budget {results['budgets'][str(workers)]} mean candidates"
        yield ""
        if not finals:
            yield f"No rival has {LEAST} seeds yet, so no figures are shown."
            yield ""
            continue
        yield f"The best rival at the end of the budget is {best}."
        yield ""
        missing = {run["method"] for run in results["runs"]} - by_method.keys()
        if missing:
            names = "; ".join(sorted(missing))
            yield f"Not run, or with fewer than {LEAST} seeds: {names}."
            yield ""
        yield from _table(results, workers, {"random": finals.get("random"), "rival": finals[best]})
        yield ""


def _table(results: Results, workers: int, shares: dict[str, float | None]) -> Iterator[str]:
    """Yield the table of a number of workers; `shares` are those that curves are to reach."""
    by_method = curves(results, workers)
    others = rivals(by_method)
    heads = [f"share at {percent} %" for percent in SHOWN]
    heads += [*(f"compute to {name}" for name in shares), "worse", "filled", "seeds"]
    yield f"| method | {' | '.join(heads)} |"
    yield "|" + " --- |" * (1 + len(heads))
    limit = np.array(results["limits"][str(workers)])
    cells = [f"{_at(limit, percent):.4f}" for percent in SHOWN] + _reached(limit, shares)
    yield f"| limit | {' | '.join(cells)} |" + " |" * (len(heads) - len(cells))
    for name, rows in by_method.items():
        at = [_at(rows, percent) for percent in SHOWN]
        cells = [f"{one.mean():.4f} +- {half_width(one):.4f}" for one in at]
        cells += _reached(rows.mean(axis=0), shares)
        points = rows.shape[1] - rows.shape[1] * FROM // 100 + 1
        cells.append(f"{worse(rows, others)} of {points}" if name.startswith(OURS) else "")
        cells.append(f"{_filled(results, workers, name):.0%}")
        yield f"| {name} | {' | '.join(cells)} | {len(rows)} |"


def _filled(results: Results, workers: int, method: str) -> float:
    """Return the share of the candidates of a method that were drawn in its place."""
    runs = [r for r in results["runs"] if r["workers"] == workers and r["method"] == method]
    return float(sum(r["filled"] for r in runs) / sum(r["started"] for r in runs))


def _at(rows: Array, percent: int) -> Array:
    """Return the values of curves (..., points) at a percentage of the budget."""
    values: Array = rows[..., rows.shape[-1] * percent // 100 - 1]
    return values


def _reached(curve: Array, shares: dict[str, float | None]) -> list[str]:
    """Return the cells of the compute until a curve reaches some shares."""
    return ["" if share is None else f"{compute_to(curve, share):.2f}" for share in shares.values()]


def ranks(table: Table) -> Iterator[str]:
    """Yield the lines on how the losses at the points of training rank the final ones."""
    rows = table.rows[table.rows["seed"] == 0]
    final = rows[f"loss_{RUNGS}"]
    yield "## Ranks at the points of training"
    yield ""
    yield f"Rank correlation (Spearman) with the final loss, over {len(rows)} models of one seed."
    yield "The best third is that at the point."
    yield ""
    yield "| tokens | all | best third |"
    yield "| --- | --- | --- |"
    for rung in range(1, RUNGS):
        loss = rows[f"loss_{rung}"]
        best = loss <= loss.quantile(1 / 3)
        every, third = spearman(loss, final), spearman(loss[best], final[best])
        yield f"| {table.tokens * rung // RUNGS:,} | {every:.2f} | {third:.2f} |"
    yield ""
    first = rows.set_index("fingerprint")[f"loss_{RUNGS}"]
    for seed in sorted(set(table.rows["seed"]) - {0}):
        other = table.rows[table.rows["seed"] == seed].set_index("fingerprint")[f"loss_{RUNGS}"]
        both = first.index.intersection(other.index)
        apart = first[both] - other[both]
        agreement = spearman(first[both], other[both])
        yield f"Seed {seed} trained {len(both)} of them again. The final losses of both seeds have"
        yield f"the rank correlation {agreement:.2f}; one loss has the standard deviation"
        yield f"{apart.std() / 2**0.5:.4f} nats."
    yield ""


def figure(results: Results) -> go.Figure:
    """Return mean curves of the methods, a panel for each number of workers with rivals.

    Variants of a method are in the tables alone.
    """
    numbers = sorted({run["workers"] for run in results["runs"]})
    shown = {
        number: {name: rows for name, rows in curves(results, number).items() if "," not in name}
        for number in numbers
    }
    numbers = [number for number in numbers if rivals(shown[number])]
    names = sorted({name for number in numbers for name in shown[number]})
    titles = [f"{number} workers" for number in numbers]
    drawn = make_subplots(cols=len(numbers), subplot_titles=titles, shared_yaxes=True)
    for column, number in enumerate(numbers, 1):
        budget = results["budgets"][str(number)]
        for name, rows in shown[number].items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            x = budget * np.arange(1, rows.shape[1] + 1) / rows.shape[1]
            y = 1 - rows.mean(axis=0)
            drawn.add_scatter(
                x=x, y=y, name=name, legendgroup=name, showlegend=column == 1, row=1, col=column,
                line={"color": colour, "width": 3 if name.startswith(OURS) else 1.5},
            )  # fmt: skip
        limit = np.array(results["limits"][str(number)])
        drawn.add_scatter(
            x=budget * np.arange(1, len(limit) + 1) / len(limit), y=1 - limit, name="limit",
            legendgroup="limit", showlegend=column == 1, row=1, col=column,
            line={"color": "#888", "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        drawn.update_xaxes(title="training compute, mean candidates", row=1, col=column)
    ticks = [1.0, 0.1, 0.01, 0.001, 0.0001]
    words = ["100 %", "10 %", "1 %", "0.1 %", "0.01 %"]
    drawn.update_yaxes(
        type="log", range=[-4, 0], tickvals=ticks, ticktext=words, gridcolor="#eee", showgrid=True
    )
    drawn.update_yaxes(title="hypervolume that is missing", row=1, col=1)
    drawn.update_layout(
        template="simple_white",
        font={"family": "DejaVu Sans, sans-serif", "size": 12},
        margin={"l": 70, "r": 10, "t": 30, "b": 20},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
    )
    return drawn


def write(results: Results, table: Table, folder: Path) -> None:
    """Write the page and the picture into a folder; the picture needs Chromium."""
    head = HEAD.format(**results, first=FROM, level=LEVEL, free_repeats=FREE_REPEATS)
    text = "\n".join([head, *tables(results), *draws.lines(), *ranks(table)])
    (folder / "search_benchmark.md").write_text(text, encoding="utf-8")
    save(figure(results), SIZE, folder / "search.png")
