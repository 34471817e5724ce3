"""Print docs/benchmarks.md: what the speed benchmarks measure on this machine, by running them.

    python benchmarks/page.py [--quick] > docs/benchmarks.md

It takes about 15 minutes, in which nothing else should run. With two threads on two cores that
other work uses, the threads wait for each other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {
    "A training step of an MoE layer": [
        "layers.py --threads 1 --rounds 4",
        "layers.py --threads 2 --rounds 4 --quick",
        "layers.py --threads 1 --rounds 4 --dtype bfloat16",
        "layers.py --threads 2 --rounds 4 --quick --dtype bfloat16",
        "layers.py --quick --batched",
    ],
    "A training step of a model": [
        "step.py --threads 1 --rounds 6",
        "step.py --threads 1 --rounds 6 --keep",
    ],
    "Batched decoding": ["decode.py --threads 1 --rounds 11"],
    "Batches from memory-mapped shards": ["streaming.py"],
    "Reading a large study": ["readers.py"],
    "The service under load": ["service.py"],
}
"""Heading -> the runs below it."""
NOTES = {
    "Reading a large study": """\
Former commands read the whole study. On the same database and machine they took, imports included:
status 10.5 s and 686 MB, front 11.1 s and 686 MB, show 7.1 s and 687 MB. `Study.front()` took 10.5
s and 682 MB. The first publishing took 30.2 s and a later one 13.8 s, with 688 MB. Other work ran
on the two cores meanwhile, so CPU seconds say more than seconds. The first publishing writes a note
for each of the 352 members of the front. A later one writes the notes that changed.
""",
}
"""Heading -> what is said before its runs."""
PAGE = """\
# Benchmarks of speed

Each ratio compares times of two sides that run alternately in one process, so it holds on other
machines of the same kind. Below 1 is faster. Milliseconds were measured on this machine. The first
lines of each file in `benchmarks/` say how it measures. `python benchmarks/page.py` writes this
page{how}. Other work on the machine changes the ratios: two runs of one command differed by up to
0.1.

Matrix products and the activation take most of the time; sorting, gathering and adding up rows
take a few percent. A layer with many experts is slower than a dense one for two reasons. Products
of few rows are slower, and the gradient of every expert is written in each step. So the ratio
depends on m, the mean number of rows of an expert. Implementations that call the same product
differ little, such as `grouped_mm` of transformers and moenas. moenas stores a weight as (in,
out), which a CPU reads faster for few rows.

With bfloat16, moenas keeps float32 weights and casts them in each step. transformers has bfloat16
weights, gradients and routers. A processor without bfloat16 instructions emulates them, so its
ratios for bfloat16 mean little.
"""


def table(command: str, extra: list[str]) -> str:
    """Run a benchmark; return its command and output."""
    name, *flags = command.split()
    flags += [flag for flag in extra if flag not in flags]
    run = [sys.executable, str(HERE / name), *flags]
    text = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout
    return f"`python benchmarks/{' '.join([name, *flags])}`: {text}"


def main() -> None:
    """Read the flag and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes in each table")
    given = parser.parse_args()
    extra = ["--quick"] if given.quick else []
    print(PAGE.format(how=", here with `--quick`" if given.quick else ""))
    for heading, commands in RUNS.items():
        print(f"## {heading}\n", flush=True)
        if heading in NOTES:
            print(NOTES[heading], flush=True)
        for command in commands:
            print(table(command, extra), flush=True)


if __name__ == "__main__":
    main()
