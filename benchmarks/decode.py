"""Time of batched decoding over the time in transformers: an MoE layer, and a whole model's step.

    python benchmarks/decode.py [--quick] [--threads 1] [--rounds 21]

T sequences get one token each, without gradients. `layer` is the MoE layer of width 256 against the
Qwen3-MoE layer with the same weights, by each of its implementations. `model` is one token through
4 such layers with attention over 128 cached tokens and a vocabulary of 4096, against its
implementation grouped_mm. All take turns; the ratio compares the median times, CPU time with one
thread, else wall time.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import peers
import torch
import transformers
from torch import Tensor

from moenas.evaluate.malloc import tune_malloc
from moenas.model import MoE, MoEFFN, Router

SHAPES = [(16, 2, 512), (64, 8, 128)]
"""Experts, experts of a token, width of an expert."""
SEQUENCES = (4, 8, 16, 32, 64)
PAST = 128
Work = Callable[[], object]


def layers(shape: tuple[int, int, int], x: Tensor) -> dict[str, Work]:
    """Return the MoE layers as calls, ours first."""
    n_experts, top_k, width = shape
    router = Router(top_k=top_k, normalize=True)
    built = MoEFFN(n_experts=n_experts, d_expert=width, router=router).build(x.shape[-1])
    moe = peers.filled(built).eval()
    assert isinstance(moe, MoE)
    blocks = {name: peers.block_of(moe, name, x.dtype).eval() for name in peers.IMPLEMENTATIONS}
    for block in blocks.values():
        peers.agree(moe, block, x)
    return {"moenas": lambda: moe(x)} | {name: lambda b=b: b(x) for name, b in blocks.items()}


def models(shape: tuple[int, int, int], sequences: int) -> dict[str, Work]:
    """Return one decoding step of the models as calls, ours first; each forgets its token again."""
    architecture = peers.architecture(*shape)
    ours = architecture.build(seed=0).eval()
    theirs = peers.model_of(architecture, ours, "grouped_mm").eval()
    past, token = torch.randint(4096, (sequences, PAST)), torch.randint(4096, (sequences, 1))
    cache = ours.new_cache(sequences, PAST + 1)
    their_cache = transformers.DynamicCache(config=theirs.config)
    ours(past, cache)
    theirs(past, past_key_values=their_cache)

    def our_step() -> Tensor:
        for layer in cache:
            layer.length = PAST
        cache.length = PAST
        return ours(token, cache)

    def their_step() -> Any:
        logits = theirs(token, past_key_values=their_cache).logits
        their_cache.crop(-1)
        return logits

    peers.agree(lambda _: our_step(), lambda _: their_step(), token)
    return {"moenas": our_step, "grouped_mm": their_step}


def medians(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call; all take turns in a new random order each time.

    What a call finds in the processor's cache depends on the one before it.
    """
    order, draw = list(works), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        draw.shuffle(order)
        for name in order:
            seconds, _ = peers.timed(works[name])
            if turn > 1:
                times[name].append(seconds)
    return {name: statistics.median(samples) for name, samples in times.items()}


def rows(shapes: list[tuple[int, int, int]], rounds: int) -> Iterator[str]:
    """Write the table, row by row."""
    yield "| | E | K | f | T | moenas ms | best of transformers | ms | moenas over it |"
    yield "| --- | --: | --: | --: | --: | --: | --- | --: | --: |"
    for shape in shapes:
        for sequences in SEQUENCES:
            x = torch.randn(sequences, 1, 256)
            for what, works in (
                ("layer", layers(shape, x)),
                ("model", models(shape, sequences)),
            ):
                ours, *others = medians(works, rounds).items()
                name, best = min(others, key=lambda item: item[1])
                cells = [what, *map(str, shape), str(sequences), f"{ours[1] * 1e3:.2f}"]
                cells += [name, f"{best * 1e3:.2f}", f"{ours[1] / best:.2f}"]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Read the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 experts only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tune_malloc()
    torch.manual_seed(0)
    print(peers.machine())
    print(f"float32, {given.threads} thread(s)\n")
    with torch.no_grad():
        for line in rows(SHAPES[:1] if given.quick else SHAPES, given.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
