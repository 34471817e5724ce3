"""Print docs/benchmarks.md: what the speed benchmarks measure on this machine, by running them.

    python benchmarks/page.py [--quick] > docs/benchmarks.md

It takes about 9 minutes, in which nothing else should run: with two threads on two cores that
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
}
"""Heading -> the runs below it."""
NOTES = {
    "Reading a large study": """\
When every command read the whole study, the same database took on the same machine, imports
included: status 10.5 s and 686 MB, front 11.1 s and 686 MB, show 7.1 s and 687 MB, `Study.front()`
10.5 s and 682 MB, publishing 30.2 s at first and 13.8 s again, 688 MB. Other work ran on its two
cores meanwhile: seconds of the processor say more than those of the clock. The first publishing
writes a note for each of 352 members of the front; later ones write what changed.
""",
}
"""Heading -> what is said before its runs."""
PAGE = """\
# Benchmarks of speed

Ratios of times that were taken in turns in one process, so that they hold on another machine of the
same kind; milliseconds say what this one was. Below 1 is faster. How each is measured stands at the
top of its file. `python benchmarks/page.py` writes this page{how}.
Other work on the machine moves even ratios: two runs of one command have differed by 0.1.

Nearly all of the time goes to matrix products and the activation; to sort, gather and add up takes
a few parts in a hundred. What a layer of many experts adds to a dense one is the lower speed of
products of few rows, and the gradient of weights that few tokens touch, which is written whole in
every step. So the ratio follows m, the rows of a mean expert, and implementations that call the
same product, as grouped_mm and ours, differ by little. Our matrices lie the other way round, (in,
out), which a CPU reads faster when an expert has few rows.

With bfloat16 our layers keep float32 weights and cast them in each step; those of transformers are
bfloat16 throughout, their router and gradients, too. On a processor without instructions for
bfloat16 it is emulated, and those ratios mean little.
"""


def table(command: str, extra: list[str]) -> str:
    """Run a benchmark and return its command and what it prints."""
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
