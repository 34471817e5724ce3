"""The process of one group: it imports what the group needs, waits for its turn, and measures.

    python benchmarks/gpu/group.py NAME FIGURES

FIGURES is a file that each figure is added to, as a line of JSON, as soon as it is known. The turn
comes as a line on standard input, with the seconds that the group has. Shortly before they are over
the stack of each thread is printed: of a group that hangs this is what is known.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.figures import GROUPS
from gpu.report import Report

BEFORE_THE_END = 2.0
"""Seconds before the limit at which stacks are printed."""


def main() -> int:
    """Measure one group; return 1 if a part of it failed."""
    name, path = sys.argv[1:3]
    group = next(one for one in GROUPS if one.name == name)
    import torch

    from gpu.card import DEVICE, GPU, machine
    from moenas.evaluate.devices import prepare_process

    measure = getattr(importlib.import_module(f"gpu.{group.module or name}"), group.function)
    limit = sys.stdin.readline().strip()
    if not limit:
        return 0  # the command ended before this turn
    faulthandler.dump_traceback_later(max(1.0, float(limit) - BEFORE_THE_END))
    torch.set_num_threads(1)
    report = Report(name, Path(path))
    report.machine(machine())
    if GPU and name != "ceilings":  # as a worker process of a study is
        prepare_process(DEVICE)
    with report.part(name):
        measure(report)
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    return 1 if report.failures else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries may hang at the end of an interpreter
