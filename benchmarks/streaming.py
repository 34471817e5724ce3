"""Share of a training step that batches from memory-mapped shards take.

`python benchmarks/streaming.py` writes shards of random tokens, and trains the median candidate of
the space `tiny` for some steps. It prints a row for each source: microseconds that a batch takes,
and their share of a training step on this machine. The page cache holds the files, as it does for
any corpus below the size of the memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moenas.data.corpus import Corpus
from moenas.data.loading import load
from moenas.data.section import parse
from moenas.evaluate.training import train
from moenas.model.architecture import Architecture
from moenas.resources import Node
from moenas.space.sections import Recipe
from moenas.space.space import Space

VOCABULARY = 256
"""Token numbers of `tiny`."""
SOURCES = {"one array": 1, "16 shards": 16, "256 shards": 256}


def write(folder: Path, tokens: int, shards: int) -> None:
    """Write shards of random tokens."""
    rng = np.random.default_rng(0)
    for i, part in enumerate(np.array_split(rng.integers(0, VOCABULARY, tokens), shards)):
        np.save(folder / f"shard_{i}.npy", part.astype(np.uint16))


def seconds(call: Callable[[int], object], times: int) -> float:
    """Return the median time of a call that is given its number."""
    durations = []
    for i in range(times):
        began = time.perf_counter()
        call(i)
        durations.append(time.perf_counter() - began)
    return statistics.median(durations)


def step_seconds(architecture: Architecture, corpus: Corpus, recipe: Recipe) -> float:
    """Return the mean time of a training step."""
    model = architecture.build(seed=0)
    began = time.perf_counter()
    list(train(model, corpus, recipe, 0))
    return (time.perf_counter() - began) / recipe.steps


def main() -> None:
    """Print a row for each source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e8, help="tokens of a corpus")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens")
    given = parser.parse_args()
    given.tokens /= 10 if given.quick else 1
    space = Space.load("tiny")
    drawn = [a for a in space.feasible(50) if not isinstance(a, str)]
    median = sorted(drawn, key=lambda a: space.cost(a).flops_per_token)[len(drawn) // 2]
    tokens = given.steps * space.train.batch * space.train.context
    recipe = replace(space.train, tokens=tokens, lr=1e-3)
    step = 0.0
    print(f"{given.tokens:,.0f} tokens\n")
    print("| source | batch, us | step, ms | share of a step |")
    print("| --- | --: | --: | --: |")
    for name, shards in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), int(given.tokens), shards)
            section = {"tokens": f"{folder}/*.npy", "vocab_size": VOCABULARY}
            corpus = load(parse(Node.wrap(section)))
            batch = seconds(
                lambda i, corpus=corpus: corpus.batch(i, recipe.batch, recipe.context, 0), 200
            )
            step = step or step_seconds(median, corpus, recipe)
            share = batch / step
            print(f"| {name} | {1e6 * batch:.0f} | {1e3 * step:.1f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
