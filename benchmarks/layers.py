"""Time of one MoE layer, forward and backward, over a dense layer of the same active FLOPs.

    python benchmarks/layers.py [--quick] [--dtype bfloat16] [--threads 1] [--rounds 5]

A row for each number of experts E and of chosen experts K. `grouped` is the layer of moenas,
`loop` the usual Python loop over experts with the same weights. Each pass routes new tokens, as
training does. All three take turns, and the least time of each counts: CPU time with one thread,
which other work on the machine disturbs less, else wall time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moenas.parts import DenseFFN, MoE, MoEFFN, Router

D_MODEL, D_EXPERT, TOKENS = 256, 512, 2048
CELLS = [(e, k) for e in (4, 8, 16, 32, 64) for k in (1, 2, 4, 8) if k <= e // 2 or e == k == 4]
QUICK = [(4, 1), (8, 2), (16, 2), (16, 4), (64, 8)]


@dataclass(frozen=True)
class Row:
    """Milliseconds of the dense layer, and the ratios to it."""

    n_experts: int
    top_k: int
    dense_ms: float
    grouped: float
    loop: float


def loop(moe: MoE, x: Tensor) -> Tensor:
    """Compute the layer expert by expert, as most published models are written."""
    tokens = x.flatten(0, 1)
    choice = moe.router(tokens)
    y = torch.zeros_like(tokens)
    for e in range(moe.experts.n_experts):
        token, place = torch.where(choice.experts == e)
        h = tokens[token] @ moe.experts.up[e].to(x.dtype).T
        out = moe.experts.activation(h) @ moe.experts.down[e].to(x.dtype).T
        y = y.index_add(0, token, out * choice.weights[token, place].unsqueeze(-1).to(out.dtype))
    return y.view_as(x)


def filled(module: nn.Module) -> nn.Module:
    """Give every weight a usual size."""
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.04)
    return module


def measure(n_experts: int, top_k: int, rounds: int, dtype: torch.dtype) -> Row:
    """Time the three layers in turn."""
    router = Router(top_k=top_k)
    moe = filled(MoEFFN(n_experts=n_experts, d_expert=D_EXPERT, router=router).build(D_MODEL))
    dense = filled(DenseFFN(d_ff=top_k * D_EXPERT).build(D_MODEL))
    assert isinstance(moe, MoE)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense,
        "grouped": moe,
        "loop": lambda x: loop(moe, x),
    }
    best = dict.fromkeys(layers, math.inf)
    for _ in range(rounds + 1):
        x = torch.randn(1, TOKENS, D_MODEL).to(dtype)
        for name, layer in layers.items():
            best[name] = min(best[name], once(layer, x))
    dense_s = best["dense"]
    return Row(n_experts, top_k, dense_s * 1e3, best["grouped"] / dense_s, best["loop"] / dense_s)


def once(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    x = x.detach().requires_grad_()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    y = layer(x)
    y.backward(torch.ones_like(y))
    return clock() - start


def table(rows: Iterator[Row]) -> Iterator[str]:
    """Write the rows as they come, then the geometric means."""
    yield f"{'E':>3} {'K':>3} {'dense ms':>9} {'grouped':>8} {'loop':>6}"
    ratios = []
    for row in rows:
        ratios.append((row.grouped, row.loop))
        cells = f"{row.n_experts:3d} {row.top_k:3d} {row.dense_ms:9.1f}"
        yield f"{cells} {row.grouped:8.2f} {row.loop:6.2f}"
    grouped, looped = (math.prod(r) ** (1 / len(r)) for r in zip(*ratios, strict=True))
    yield f"{'geometric mean':>17} {grouped:8.2f} {looped:6.2f}"


def main() -> None:
    """Read the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="five cells only")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"T={TOKENS} d={D_MODEL} f={D_EXPERT} {given.dtype}, {given.threads} thread(s)")
    dtype = getattr(torch, given.dtype)
    cells = QUICK if given.quick else CELLS
    for line in table(measure(e, k, given.rounds, dtype) for e, k in cells):
        print(line, flush=True)


if __name__ == "__main__":
    main()
