"""Find the best learning rates of small models of many shapes, and what the rule loses to them.

    python benchmarks/learning_rate.py            # runs what is missing, prints the tables
    python benchmarks/learning_rate.py --table    # prints the tables of the runs that are there

Each cell is an architecture. The rate is a grid of factors of 2 around the rule's; a cell is done
once its best rate has a worse one on either side. Regret is the loss at the rule's rate minus the
best loss of all rates. `one rate` moves all weights at the same rate, the common way; `rule` moves
the embedding at d_model / 64 times the rate of all other weights, as moenas does. At width 64
both are the same. Runs are kept in `results/learning_rate.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.errors import DivergedError
from moenas.evaluate.optimizer import BASE_WIDTH, learning_rate
from moenas.evaluate.training import train, validate
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space.sections import Recipe

RESULTS = Path(__file__).parent / "results" / "learning_rate.json"
STEPS, BATCH, CONTEXT, SEED = 200, 8, 128, 0
RECIPE = Recipe(
    tokens=STEPS * BATCH * CONTEXT, context=CONTEXT, batch=BATCH, val_tokens=32768, dtype="float32"
)


def architecture(d_model: int, n_layers: int, ffn: Plain) -> Architecture:
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


CELLS = {
    "d64 dense": architecture(64, 3, dense(128)),
    "d128 dense": architecture(128, 3, dense(256)),
    "d64 moe 8e top2": architecture(64, 3, moe(8, 2, 64)),
    "d128 moe 8e top2": architecture(128, 3, moe(8, 2, 128)),
    "d256 moe 8e top2": architecture(256, 3, moe(8, 2, 256)),
    "d96 moe 16e top4 fine": architecture(96, 3, moe(16, 4, 48)),
}
SWEEPS = [
    *(("rule", cell) for cell in CELLS),
    *(("one rate", cell) for cell in CELLS if not cell.startswith("d96")),
]
LADDERS = [
    ["d64 dense", "d128 dense"],
    ["d64 moe 8e top2", "d128 moe 8e top2", "d256 moe 8e top2"],
]
"""Cells in order of width: each should be better than the one before."""


class Runs:
    """Runs that are there, by way, cell and rate."""

    def __init__(self, corpus: Corpus | None) -> None:
        self.corpus = corpus
        self.rows: list[Plain] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def loss(self, way: str, cell: str, lr: float) -> float:
        """Return the validation loss of a run, made now if it is missing; inf if it diverged."""
        either = CELLS[cell].d_model == BASE_WIDTH
        for row in self.rows:
            same = row["cell"] == cell and math.isclose(row["lr"], lr, rel_tol=1e-6)
            if same and (either or row["way"] == way):
                return math.inf if row["loss"] is None else float(row["loss"])
        if self.corpus is None:
            raise SystemExit(f"no run of {cell} at {lr:g} yet; run this without --table")
        return self.make(self.corpus, way, cell, lr)

    def make(self, corpus: Corpus, way: str, cell: str, lr: float) -> float:
        """Train one model and keep its result."""
        recipe = replace(RECIPE, lr=lr)
        began = time.process_time()
        model = CELLS[cell].build(seed=SEED)
        if way == "one rate":
            model.d_model = BASE_WIDTH  # the width at which the rule is one rate
        try:
            for _ in train(model, corpus, recipe, SEED):
                pass
            loss = validate(model, corpus, recipe).loss
        except DivergedError:
            loss = math.inf
        seconds = round(time.process_time() - began, 1)
        row = {"way": way, "cell": cell, "lr": lr}
        outcome = {"loss": None if math.isinf(loss) else round(loss, 4), "cpu_seconds": seconds}
        setting = {"tokens": recipe.tokens, "batch": BATCH, "context": CONTEXT, "seed": SEED}
        versions = {"torch": torch.__version__, "data": corpus.sha256[:16]}
        self.rows.append({**row, **outcome, **setting, **versions})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        print(f"{way:8} {cell:24} lr {lr:.5f} loss {loss:.4f} {seconds:.0f} s", file=sys.stderr)
        return loss

    def best(self, way: str, cell: str) -> tuple[float, float]:
        """Return the best rate and its loss; neighbours on both sides in the grid are worse.

        Runs between the points of the grid count too, where there are any.
        """
        start = rule(cell)
        at = 0
        while True:
            losses = {i: self.loss(way, cell, start * 2.0**i) for i in (at, at - 1, at + 1)}
            best = min(losses, key=lambda i: losses[i])
            if best == at:
                break
            at = best
        either = CELLS[cell].d_model == BASE_WIDTH
        mine = [r for r in self.rows if r["cell"] == cell and (either or r["way"] == way)]
        row = min((r for r in mine if r["loss"] is not None), key=lambda r: float(r["loss"]))
        return float(row["lr"]), float(row["loss"])


def rule(cell: str) -> float:
    """Return the rate of the rule."""
    return learning_rate(CELLS[cell], RECIPE)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(None if args.table else load({"kind": "stdlib"}))
    best_rates = {sweep: runs.best(*sweep) for sweep in SWEEPS}
    print("| way | cell | active params | best rate | loss | rule's rate | loss | regret |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    regrets = []
    for (way, cell), (lr, best) in best_rates.items():
        there = runs.loss(way, cell, rule(cell))
        active = CELLS[cell].cost(CONTEXT).active_params
        print(
            f"| {way} | {cell} | {active:,} | {lr:.4f} | {best:.3f}"
            f" | {rule(cell):.4f} | {there:.3f} | {there - best:+.3f} |"
        )
        regrets += [there - best] if way == "rule" else []
    print(
        f"\nRegret of the rule: mean {sum(regrets) / len(regrets):.3f}, worst {max(regrets):.3f}."
    )
    for ladder in LADDERS:
        losses = [runs.loss("rule", cell, rule(cell)) for cell in ladder]
        word = "in order" if losses == sorted(losses, reverse=True) else "OUT OF ORDER"
        steps = ", ".join(f"{c} {x:.3f}" for c, x in zip(ladder, losses, strict=True))
        print(f"Under the rule: {steps}: {word}.")
    losses = [runs.loss("one rate", cell, 0.004) for cell in LADDERS[1][:2]]
    steps = ", ".join(f"{c} {x:.3f}" for c, x in zip(LADDERS[1], losses, strict=False))
    print(f"At one rate of 0.004 for all: {steps}.")


if __name__ == "__main__":
    main()
