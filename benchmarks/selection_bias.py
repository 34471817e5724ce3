"""How large the step of the selection bias must be in runs of several lengths.

    python benchmarks/selection_bias.py [--seeds 2]   # runs what is missing, prints the tables
    python benchmarks/selection_bias.py --table       # prints the tables of the runs that are there

The model has width 64 and 3 layers of experts, of which a token uses 2, with a bias on the
selection (`balance: bias`). Rate 0 stands for `balance: quantile`, whose bias has no step. The
imbalance is the MaxVio of the validation text, the mean over the layers. Runs are kept in
`results/selection_bias.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.evaluate.optimizer import learning_rate
from moenas.evaluate.training import train, validate
from moenas.model.architecture import Architecture
from moenas.records import Plain
from moenas.space.sections import Recipe

RESULTS = Path(__file__).parent / "results" / "selection_bias.json"
STEPS = [50, 100, 200, 400, 800]
QUANTILE = 0.0
RATES = [0.001, 0.003, 0.01, 0.03, 0.1, QUANTILE]
SHORT_STEPS = [50, 200]
CELLS = {
    "sigmoid, 8 experts": (8, {"score": "sigmoid", "normalize": True}, STEPS),
    "sigmoid, 32 experts": (32, {"score": "sigmoid", "normalize": True}, SHORT_STEPS),
    "softmax, 8 experts": (8, {"score": "softmax"}, SHORT_STEPS),
}
"""Name -> experts, fields of the router, and lengths of the runs in steps."""


def architecture(name: str, rate: float) -> Architecture:
    """Return the byte model of a cell."""
    n_experts, fields, _ = CELLS[name]
    balance = {"kind": "quantile"} if rate == QUANTILE else {"kind": "bias", "rate": rate}
    router = {"top_k": 2, **fields, "balance": balance}
    ffn = {"kind": "moe", "n_experts": n_experts, "d_expert": 64, "router": router}
    block = {"repeat": 3, "mixer": {"kind": "attention", "head_dim": 32}, "ffn": ffn}
    return Architecture.parse({"vocab_size": 256, "d_model": 64, "blocks": [block]})


def run(corpus: Corpus, name: str, steps: int, rate: float, seed: int) -> Plain:
    """Train one model; return its loss and imbalance."""
    model = architecture(name, rate)
    recipe = Recipe(
        tokens=steps * 8 * 128,
        context=128,
        batch=8,
        val_tokens=32768,
        dtype="float32",
        max_dead=None,
    )
    recipe = replace(recipe, lr=learning_rate(model, recipe))
    built = model.build(seed=seed)
    for _ in train(built, corpus, recipe, seed):
        pass
    measured = validate(built, corpus, recipe)
    max_vio = statistics.fmean(row["max_vio"] for row in measured.routing)
    return {"loss": round(measured.loss, 4), "max_vio": round(max_vio, 4)}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows: list[Plain] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {(row["cell"], row["steps"], row["rate"], row["seed"]) for row in rows}
    if not options.table:
        torch.set_num_threads(1)
        corpus = load({"kind": "stdlib"})
        wanted = [
            (name, steps, rate, seed)
            for name, (_, _, lengths) in CELLS.items()
            for seed in range(options.seeds)
            for steps in lengths
            for rate in RATES
        ]
        for name, steps, rate, seed in wanted:
            if (name, steps, rate, seed) in known:
                continue
            row = {"cell": name, "steps": steps, "rate": rate, "seed": seed}
            rows.append({**row, **run(corpus, name, steps, rate, seed)})
            RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            print(rows[-1], file=sys.stderr, flush=True)
    for name, (_, _, lengths) in CELLS.items():
        heads = ["quantile" if rate == QUANTILE else f"{rate:g}" for rate in RATES]
        print(f"\n| {name}: steps | {' | '.join(heads)} |")
        print("|--:|" + "--:|" * len(RATES))
        for steps in lengths:
            cells = [_cell(rows, name, steps, rate) for rate in RATES]
            print(f"| {steps} | " + " | ".join(cells) + " |")


def _cell(rows: list[Plain], name: str, steps: int, rate: float) -> str:
    """Return the mean imbalance and loss of the seeds of one length and rate."""
    there = [r for r in rows if (r["cell"], r["steps"], r["rate"]) == (name, steps, rate)]
    if not there:
        return ""
    vio, loss = (statistics.fmean(r[key] for r in there) for key in ("max_vio", "loss"))
    return f"{vio:.2f} ({loss:.3f})"


if __name__ == "__main__":
    main()
