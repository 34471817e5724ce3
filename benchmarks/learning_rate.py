"""Find the best learning rates of small models of many shapes, and what the rule loses to them.

    python benchmarks/learning_rate.py [--seeds 3]   # runs what is missing, prints the tables
    python benchmarks/learning_rate.py --table       # prints the tables of the runs that are there

Each cell is an architecture with a batch and a number of steps. The rates are a grid of factors of
sqrt(2) around the rule's; it grows until the best rate has a worse one on either side. Regret is
the loss at the rule's rate minus the loss at the best rate that ran, as a mean over the seeds.
The best of several noisy means is too good by chance, so the regret is rather too large. The noise
is the standard error of the regret over the seeds.

`one rate` moves all weights at the same rate, the common way; `rule` moves the embedding at
d_model / 64 times the rate of all other weights, as moenas does. At width 64 both are the same.
Runs are kept in `results/learning_rate.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.errors import DivergedError
from moenas.evaluate.optimizer import BASE_STEP_TOKENS, BASE_WIDTH, learning_rate
from moenas.evaluate.training import train, validate
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space.sections import Recipe

RESULTS = Path(__file__).parent / "results" / "learning_rate.json"
HALVES = range(-2, 3)
"""Exponents of sqrt(2) of the rates that every cell is trained at, relative to the rule's."""
EXPONENTS = [Fraction(text) for text in ("0", "1/5", "1/4", "1/3", "2/5", "1/2")]
"""Powers of the tokens of a step that are compared."""
ENOUGH = 0.01
"""Regret in nats below which a rate counts as the best one."""


@dataclass(frozen=True)
class Cell:
    """An architecture and how it is trained."""

    architecture: Architecture
    batch: int = 8
    steps: int = 200
    context: int = 128

    @property
    def recipe(self) -> Recipe:
        """The recipe at the rule's rate."""
        return Recipe(
            tokens=self.steps * self.batch * self.context,
            context=self.context,
            batch=self.batch,
            val_tokens=32768,
            dtype="float32",
        )

    @property
    def rule(self) -> float:
        """The rate of the rule."""
        return learning_rate(self.architecture, self.recipe)


def model(d_model: int, n_layers: int, ffn: Plain) -> Architecture:
    """Return a byte model with heads of 32."""
    block = {"repeat": n_layers, "mixer": {"kind": "attention", "head_dim": 32}, "ffn": ffn}
    return Architecture.parse({"vocab_size": 256, "d_model": d_model, "blocks": [block]})


def dense(d_ff: int) -> Plain:
    """Return a dense feed-forward layer."""
    return {"kind": "dense", "d_ff": d_ff}


def moe(n_experts: int, top_k: int, d_expert: int) -> Plain:
    """Return a mixture of experts."""
    router = {"top_k": top_k}
    return {"kind": "moe", "n_experts": n_experts, "d_expert": d_expert, "router": router}


MIXTURE = moe(8, 2, 64)
BASE = "d64 moe 8e top2"
CELLS = {
    BASE: Cell(model(64, 3, MIXTURE)),
    "steps 50": Cell(model(64, 3, MIXTURE), steps=50),
    "steps 600": Cell(model(64, 3, MIXTURE), steps=600),
    "batch 2": Cell(model(64, 3, MIXTURE), batch=2, steps=800),
    "batch 2, 200 steps": Cell(model(64, 3, MIXTURE), batch=2),
    "batch 4": Cell(model(64, 3, MIXTURE), batch=4, steps=400),
    "batch 16": Cell(model(64, 3, MIXTURE), batch=16, steps=100),
    "batch 32": Cell(model(64, 3, MIXTURE), batch=32, steps=50),
    "batch 32, 200 steps": Cell(model(64, 3, MIXTURE), batch=32),
    "batch 128, 200 steps": Cell(model(64, 3, MIXTURE), batch=128),
    "batch 32 of 32 tokens": Cell(model(64, 3, MIXTURE), batch=32, context=32),
    "layers 1": Cell(model(64, 1, MIXTURE)),
    "layers 8": Cell(model(64, 8, MIXTURE)),
    "experts 2": Cell(model(64, 3, moe(2, 2, 64))),
    "experts 32": Cell(model(64, 3, moe(32, 2, 64))),
    "top1": Cell(model(64, 3, moe(8, 1, 64))),
    "top4": Cell(model(64, 3, moe(8, 4, 64))),
    "d64 dense": Cell(model(64, 3, dense(128))),
    "d128 moe 8e top2": Cell(model(128, 3, moe(8, 2, 128))),
    "d128 batch 2": Cell(model(128, 3, moe(8, 2, 128)), batch=2, steps=800),
    "d128 batch 32": Cell(model(128, 3, moe(8, 2, 128)), batch=32, steps=50),
    "d128 dense": Cell(model(128, 3, dense(256))),
    "d96 moe 16e top4 fine": Cell(model(96, 3, moe(16, 4, 48))),
    "d256 moe 8e top2": Cell(model(256, 3, moe(8, 2, 256))),
}
"""Name -> cell. A short name says what differs from the first cell."""
REPEATED = [name for name in CELLS if name != "d256 moe 8e top2"]
"""Cells that are trained with every seed; a run of the widest one takes minutes."""
ONE_RATE = ["d64 dense", "d128 dense", BASE, "d128 moe 8e top2", "d256 moe 8e top2"]
"""Cells that are also trained at one rate for all weights, with the first seed and factors of 2."""
LADDERS = [["d64 dense", "d128 dense"], [BASE, "d128 moe 8e top2", "d256 moe 8e top2"]]
"""Cells in order of width: each should be better than the one before."""


class Runs:
    """Runs that are there, by way, cell, rate and seed."""

    def __init__(self, corpus: Corpus | None) -> None:
        self.corpus = corpus
        self.rows: list[Plain] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def loss(self, way: str, name: str, lr: float, seed: int) -> float | None:
        """Return the validation loss of a run, made now if it is missing; inf if it diverged.

        The result is None for a missing run where nothing is to be trained.
        """
        stored = self.stored(way, name, lr, seed)
        if stored is None and self.corpus is not None:
            return self.make(self.corpus, way, name, lr, seed)
        return stored

    def stored(self, way: str, name: str, lr: float, seed: int) -> float | None:
        """Return the validation loss of a run that is there, or None; inf if it diverged."""
        either = CELLS[name].architecture.d_model == BASE_WIDTH
        for row in self.rows:
            same = (row["cell"], row["seed"]) == (name, seed)
            if same and math.isclose(row["lr"], lr, rel_tol=1e-6) and (either or row["way"] == way):
                return math.inf if row["loss"] is None else float(row["loss"])
        return None

    def make(self, corpus: Corpus, way: str, name: str, lr: float, seed: int) -> float:
        """Train one model and keep its result."""
        cell = CELLS[name]
        recipe = replace(cell.recipe, lr=lr)
        began = time.process_time()
        built = cell.architecture.build(seed=seed)
        if way == "one rate":
            built.d_model = BASE_WIDTH  # the width at which the rule is one rate
        try:
            for _ in train(built, corpus, recipe, seed):
                pass
            loss = validate(built, corpus, recipe).loss
        except DivergedError:
            loss = math.inf
        seconds = round(time.process_time() - began, 1)
        row = {"way": way, "cell": name, "lr": lr}
        outcome = {"loss": None if math.isinf(loss) else round(loss, 4), "cpu_seconds": seconds}
        setting = {"tokens": recipe.tokens, "batch": cell.batch, "context": cell.context}
        setting["seed"] = seed
        versions = {"torch": torch.__version__, "data": corpus.sha256[:16]}
        self.rows.append({**row, **outcome, **setting, **versions})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        text = f"{way:8} {name:24} seed {seed} lr {lr:.5f} loss {loss:.4f} {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)
        return loss

    def means(self, name: str, seeds: list[int]) -> dict[float, list[float]]:
        """Return rate -> loss of each seed, of all rates of a cell that have a run of each seed."""
        either = CELLS[name].architecture.d_model == BASE_WIDTH
        rates = {
            float(row["lr"])
            for row in self.rows
            if row["cell"] == name and (either or row["way"] == "rule")
        }
        losses = dict[float, list[float]]()
        for rate in sorted(rates):
            there = [self.stored("rule", name, rate, seed) for seed in seeds]
            if None not in there:
                losses[rate] = [loss for loss in there if loss is not None]
        return losses

    def row(self, name: str, seeds: list[int]) -> Regret | None:
        """Return the regret of the rule for a cell; None if a run of its grid is missing."""
        rule = CELLS[name].rule
        losses: dict[int, float] = {}
        exponents = list(HALVES)
        while exponents:
            for exponent in exponents:
                rate = rule * math.sqrt(2.0) ** exponent
                each = [self.loss("rule", name, rate, seed) for seed in seeds]
                if None in each:
                    return None
                losses[exponent] = statistics.fmean(loss for loss in each if loss is not None)
            best = min(losses, key=lambda e: losses[e])
            exponents = [e for e in (best - 1, best + 1) if e not in losses]
        every = self.means(name, seeds)
        ours = next(each for rate, each in every.items() if math.isclose(rate, rule, rel_tol=1e-6))
        best_rate = min(every, key=lambda rate: statistics.fmean(every[rate]))
        differences = [a - b for a, b in zip(ours, every[best_rate], strict=True)]
        spread = statistics.stdev(differences) if len(seeds) > 1 else 0.0
        ours_is_best = math.isclose(best_rate, rule, rel_tol=1e-6)
        noise = None if ours_is_best else spread / math.sqrt(len(seeds))
        best_loss = statistics.fmean(every[best_rate])
        return Regret(best_rate, best_loss, statistics.fmean(ours), noise)

    def interpolated(self, name: str, rate: float, seeds: list[int]) -> float | None:
        """Return the mean loss at a rate, linear in its logarithm between two rates that ran."""
        means = {r: statistics.fmean(each) for r, each in self.means(name, seeds).items()}
        below, above = [r for r in means if r <= rate], [r for r in means if r >= rate]
        if not below or not above:
            return None
        low, high = max(below), min(above)
        share = 0.0 if low == high else math.log(rate / low) / math.log(high / low)
        return (1 - share) * means[low] + share * means[high]

    def best_at_one_rate(self, name: str) -> tuple[float, float] | None:
        """Return the best rate for all weights of a cell, on a grid of factors of 2, and its loss.

        Runs between the points of the grid count too, where there are any.
        """
        at = 0
        while True:
            losses = {
                i: self.loss("one rate", name, CELLS[name].rule * 2.0**i, 0)
                for i in (at, at - 1, at + 1)
            }
            there = {i: loss for i, loss in losses.items() if loss is not None}
            if len(there) < len(losses):
                return None
            best = min(there, key=lambda i: there[i])
            if best == at:
                break
            at = best
        either = CELLS[name].architecture.d_model == BASE_WIDTH
        mine = [
            row
            for row in self.rows
            if (row["cell"], row["seed"]) == (name, 0) and (either or row["way"] == "one rate")
        ]
        row = min((r for r in mine if r["loss"] is not None), key=lambda r: float(r["loss"]))
        return float(row["lr"]), float(row["loss"])


@dataclass(frozen=True)
class Regret:
    """What the rule loses to the best rate that was tried."""

    best_rate: float
    best_loss: float
    rule_loss: float
    noise: float | None
    """Standard error of the regret over the seeds; None if no rate is better than the rule's."""

    @property
    def nats(self) -> float:
        """The regret."""
        return self.rule_loss - self.best_loss


def print_rule(runs: Runs, seeds: list[int]) -> None:
    """Print the regret of the rule in each cell whose runs are there."""
    print(f"Seeds: {len(seeds)}.\n")
    print(
        "| cell | active params | steps x batch | best rate | loss | rule's rate | loss | regret |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    regrets = []
    for name in REPEATED:
        cell, row = CELLS[name], runs.row(name, seeds)
        if row is None:
            continue
        regrets.append(row.nats)
        active = cell.architecture.cost(cell.context).active_params
        noise = "" if row.noise is None else f" +- {row.noise:.3f}"
        print(
            f"| {name} | {active:,} | {cell.steps} x {cell.batch} | {row.best_rate:.4f}"
            f" | {row.best_loss:.3f} | {cell.rule:.4f} | {row.rule_loss:.3f}"
            f" | {row.nats:.3f}{noise} |"
        )
    if regrets:
        within = sum(regret <= ENOUGH for regret in regrets)
        print(
            f"\nRegret of the rule: mean {statistics.fmean(regrets):.3f}, worst {max(regrets):.3f};"
            f" at most {ENOUGH} in {within} of {len(regrets)} cells."
        )


def print_exponents(runs: Runs, seeds: list[int]) -> None:
    """Print the regret of powers of the tokens of a step, over the cells that have others."""
    print("\n| power of the tokens of a step | mean regret | worst | cells |")
    print("|---|--:|--:|--:|")
    for exponent in EXPONENTS:
        regrets = []
        for name in REPEATED:
            cell, row = CELLS[name], runs.row(name, seeds)
            tokens = cell.batch * cell.context
            if row is None or tokens == BASE_STEP_TOKENS:
                continue
            rate = learning_rate(cell.architecture, replace(cell.recipe, lr_scale=1.0))
            rate *= (tokens / BASE_STEP_TOKENS) ** float(exponent)
            loss = runs.interpolated(name, rate, seeds)
            if loss is not None:
                regrets.append(loss - row.best_loss)
        if regrets:
            mean, worst = statistics.fmean(regrets), max(regrets)
            print(f"| {exponent} | {mean:.3f} | {worst:.3f} | {len(regrets)} |")


def print_one_rate(runs: Runs) -> None:
    """Print what one rate for all weights costs, with the first seed."""
    print("\n| cell | best rate for all weights | loss | the rule's rate and factor |")
    print("|---|--:|--:|--:|")
    for name in ONE_RATE:
        best, ours = runs.best_at_one_rate(name), runs.loss("rule", name, CELLS[name].rule, 0)
        if best is not None and ours is not None:
            print(f"| {name} | {best[0]:.4f} | {best[1]:.3f} | {ours:.3f} |")
    for ladder in LADDERS:
        losses = [runs.loss("rule", name, CELLS[name].rule, 0) for name in ladder]
        known = [loss for loss in losses if loss is not None]
        if len(known) == len(losses):
            word = "in order" if known == sorted(known, reverse=True) else "OUT OF ORDER"
            steps = ", ".join(f"{c} {x:.3f}" for c, x in zip(ladder, known, strict=True))
            print(f"\nUnder the rule: {steps}: {word}.")
    pair = [runs.loss("one rate", name, 0.004, 0) for name in LADDERS[1][:2]]
    if None not in pair:
        steps = ", ".join(f"{c} {x:.3f}" for c, x in zip(LADDERS[1], pair, strict=False))
        print(f"At one rate of 0.004 for all: {steps}.")


def main() -> None:
    """Run what is missing, a seed at a time, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(None if args.table else load({"kind": "stdlib"}))
    if not args.table:
        for seeds in range(1, args.seeds + 1):
            for name in REPEATED:
                runs.row(name, list(range(seeds)))
    print_rule(runs, list(range(args.seeds)))
    print_exponents(runs, list(range(args.seeds)))
    print_one_rate(runs)


if __name__ == "__main__":
    main()
