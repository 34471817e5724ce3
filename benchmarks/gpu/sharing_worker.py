"""One of the processes that share a GPU: it gets ready, waits for a word, and trains for a while.

python benchmarks/gpu/sharing_worker.py eager|graph CONTEXT SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from gpu.card import sized, synchronize
from gpu.models import D256, recipe
from gpu.training import capture, opened, warm_up

AT_A_TIME = 10
"""Steps between two looks at the clock, each after the device has done them."""


def main() -> None:
    """Say that all is ready, and answer until nothing more is asked."""
    how, context = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    with opened(D256.build(), recipe(sized(4000, 400), context)) as steps:
        warm_up(steps)
        if how == "graph":
            capture(steps)
        steps.step()
        synchronize()
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            limit, first, began = float(line), steps.done, time.perf_counter()
            while time.perf_counter() - began < limit:
                if steps.done + AT_A_TIME > steps.recipe.steps:
                    break
                for _ in range(AT_A_TIME):
                    steps.step()
                synchronize()
            took = time.perf_counter() - began
            print(json.dumps({"rate": (steps.done - first) / took}), flush=True)


if __name__ == "__main__":
    main()
