"""Time of a training step of an MoE layer, over a dense layer of the same active FLOPs.

    python benchmarks/layers.py [--quick] [--dtype bfloat16] [--threads 1] [--rounds 7]

A row for each number of experts E and of chosen experts K, with m = T K / E, the rows of a mean
expert. A step routes new tokens and goes through router, dispatch, experts and combination forward
and backward, from empty gradients. `moenas` also counts its load and works out its balance losses,
and goes backward through them; the others have none. `eager`, `grouped_mm` and `batched_mm` are the
Qwen3-MoE layer of transformers with the same weights. batched_mm copies an expert's weights for
every slot. For these 2048 tokens it takes over 6 GB for each expert of a token: `--batched` adds it
at 64 tokens. All take turns. A ratio compares the least times: CPU time with one thread, which
other work on the machine disturbs less, else wall time.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from torch import Tensor, nn

from moenas.evaluate.malloc import tune_malloc
from moenas.model import DenseFFN, MoE, MoEFFN, Router

D_MODEL, D_EXPERT, TOKENS = 256, 512, 2048
CELLS = [(e, k) for e in (4, 8, 16, 32, 64) for k in (1, 2, 4, 8) if k <= e // 2 or e == k == 4]
QUICK = [(4, 1), (8, 2), (16, 2), (16, 4), (64, 8)]


@dataclass(frozen=True)
class Cell:
    """Experts, experts of a token, tokens, and the seconds of each layer."""

    n_experts: int
    top_k: int
    tokens: int
    seconds: dict[str, float]

    @property
    def rows(self) -> int:
        """Rows of a mean expert."""
        return self.tokens * self.top_k // self.n_experts

    def ratios(self) -> list[float]:
        """Return the time of each MoE layer over the time of the dense layer."""
        dense, *others = self.seconds.values()
        return [x / dense for x in others]

    def line(self) -> str:
        """Write a row of the table."""
        dense_ms = self.seconds["dense"] * 1e3
        cells = [str(self.n_experts), str(self.top_k), str(self.rows), f"{dense_ms:.1f}"]
        return f"| {' | '.join(cells + [f'{x:.2f}' for x in self.ratios()])} |"


def step(layer: Callable[[Tensor], Tensor], weights: nn.Module, x: Tensor) -> None:
    """Go forward and backward through a layer."""
    y = layer(x)
    if isinstance(layer, MoE):
        torch.autograd.backward((y, layer.auxiliary_loss()), (torch.ones_like(y), None))
    else:
        y.backward(torch.ones_like(y))


def measure(
    shape: tuple[int, int, int], theirs: tuple[str, ...], rounds: int, dtype: torch.dtype
) -> Cell:
    """Time all layers in turn, for (E, K, T)."""
    n_experts, top_k, tokens = shape
    router = Router(top_k=top_k, normalize=True)
    moe = peers.filled(MoEFFN(n_experts=n_experts, d_expert=D_EXPERT, router=router).build(D_MODEL))
    assert isinstance(moe, MoE)
    layers: dict[str, nn.Module] = {
        "dense": peers.filled(DenseFFN(d_ff=top_k * D_EXPERT).build(D_MODEL)),
        "moenas": moe,
    }
    layers |= {name: peers.block_of(moe, name, dtype) for name in theirs}
    for name in theirs:
        peers.agree(moe, layers[name], torch.randn(1, 64, D_MODEL).to(dtype))
    best = dict.fromkeys(layers, math.inf)
    for _ in range(rounds + 1):
        drawn = torch.randn(1, tokens, D_MODEL).to(dtype)
        for name, layer in layers.items():
            layer.zero_grad(set_to_none=True)
            x = drawn.clone().requires_grad_()
            seconds, _ = peers.timed(step, layer, layer, x)
            best[name] = min(best[name], seconds)
    return Cell(n_experts, top_k, tokens, best)


def mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.prod(values) ** (1 / len(values))


def table(cells: Iterator[Cell], names: list[str]) -> Iterator[str]:
    """Write the cells as they come, then the geometric means of all and by rows of an expert."""
    yield f"| E | K | m | dense ms | {' | '.join(names)} |"
    yield "| --: | --: | --: | --: |" + " --: |" * len(names)
    by_rows: dict[int, list[list[float]]] = defaultdict(list)
    for cell in cells:
        by_rows[cell.rows].append(cell.ratios())
        yield cell.line()
    groups = {f"m = {m}": group_ratios for m, group_ratios in sorted(by_rows.items())}
    groups["all"] = [ratios for every in by_rows.values() for ratios in every]
    for name, group_ratios in groups.items():
        means = (f"{mean(list(column)):.2f}" for column in zip(*group_ratios, strict=True))
        yield f"| {name} | | | | {' | '.join(means)} |"


def main() -> None:
    """Read the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="five cells only")
    parser.add_argument("--batched", action="store_true", help="64 tokens, and batched_mm, too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tune_malloc()  # as moenas trains; the others gain by it, too
    torch.manual_seed(0)
    tokens = 64 if given.batched else TOKENS
    theirs = peers.IMPLEMENTATIONS if given.batched else peers.IMPLEMENTATIONS[:2]
    print(peers.machine())
    print(f"T={tokens} d={D_MODEL} f={D_EXPERT} {given.dtype}, {given.threads} thread(s)\n")
    dtype = getattr(torch, given.dtype)
    shapes = [(e, k, tokens) for e, k in (QUICK if given.quick else CELLS)]
    cells = (measure(shape, theirs, given.rounds, dtype) for shape in shapes)
    for line in table(cells, ["moenas", *theirs]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
