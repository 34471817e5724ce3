"""Time of a training step of a whole model, over the time of the same model in transformers.

    python benchmarks/step.py [--quick] [--threads 1] [--rounds 10] [--keep]

A model of the Qwen3-MoE family: 4 layers of width 256, 4 heads of 64 with 2 for keys and values, a
vocabulary of 4096. A step has 8 sequences of 256 tokens. Both start from the same weights; first
their logits and losses are compared. A step is forward, cross entropy and the router's auxiliary
loss, backward, and torch's fused AdamW. The models take turns; the ratio is the median of the
ratios of each turn. With one thread CPU time counts, which other work on the machine disturbs less,
else wall time. With --keep the process keeps freed memory, as it does in training by moenas. Both
gain by it, and more if a step makes bigger tensors.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch
from torch import Tensor, nn

from moenas.evaluate.malloc import tune_malloc
from moenas.model.architecture import Architecture, Model

BATCH, CONTEXT = 8, 256
SHAPES = [(16, 2, 512), (64, 8, 128)]
"""Experts, experts of a token, width of an expert."""
AGAINST = ("grouped_mm", "eager")


@dataclass
class Step:
    """A model, its optimizer and how it computes a loss."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def __call__(self, tokens: Tensor, targets: Tensor) -> float:
        """Take a step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens, targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def our_step(model: Model) -> Step:
    """Return the step of a model of moenas."""

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return model.loss(tokens, targets) + model.auxiliary_loss()

    return Step(model.train(), loss)


def their_step(architecture: Architecture, model: Model, implementation: str) -> Step:
    """Return the step of the same model in transformers."""
    theirs = peers.model_of(architecture, model, implementation).train()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        output = theirs(
            tokens, labels=targets, shift_labels=targets, output_router_logits=True, use_cache=False
        )
        return output.loss

    return Step(theirs, loss)


def measure(shape: tuple[int, int, int], against: tuple[str, ...], rounds: int) -> list[str]:
    """Return the rows of one shape, after checking that all compute the same loss."""
    architecture = peers.architecture(*shape)
    model = architecture.build(seed=0)
    steps = {"moenas": our_step(model)}
    steps |= {f"transformers {name}": their_step(architecture, model, name) for name in against}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        text = torch.randint(4096, (BATCH, CONTEXT + 1))
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        losses = {}
        for name, step in steps.items():
            seconds, losses[name] = peers.timed(step, tokens, targets)
            if turn > 1:
                times[name].append(seconds)
        if turn == 0 and max(losses.values()) - min(losses.values()) > 1e-2:
            raise SystemExit(f"the losses of one step differ: {losses}")
    rows = []
    for name, samples in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["moenas"], samples, strict=True))
        cells = [*map(str, shape), name, f"{statistics.median(samples) * 1e3:.0f}", f"{ratio:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def check(shape: tuple[int, int, int]) -> None:
    """Stop unless the logits agree."""
    architecture = peers.architecture(*shape)
    model = architecture.build(seed=0).eval()
    theirs = peers.model_of(architecture, model, "eager").eval()
    tokens = torch.randint(4096, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Read the flags and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 experts against grouped_mm only")
    parser.add_argument("--keep", action="store_true", help="the process keeps freed memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.keep:
        tune_malloc()
    torch.manual_seed(0)
    print(peers.machine())
    print(f"{BATCH * CONTEXT} tokens a step, float32, {given.threads} thread(s)\n")
    print("| experts | top k | width | | ms a step | moenas over it |")
    print("| --: | --: | --: | --- | --: | --: |")
    for shape in SHAPES[:1] if given.quick else SHAPES:
        check(shape)
        for row in measure(shape, AGAINST[:1] if given.quick else AGAINST, given.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
