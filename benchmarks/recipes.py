"""Run the recipes of docs/recipes.md, and write what their commands print into the page.

    python benchmarks/recipes.py [WORD]

With a word only recipes whose title has it are run. Each recipe is run in a folder of its own, with
the files that the page shows. `make transcripts` runs this file; tests/test_recipes.py compares the
page with new outputs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
COLUMNS = 110
"""Width of the terminal that the transcripts show."""
CONFIG = "config.json"
"""The file of a block in JSON, which has no comment with a name."""
PROGRAMS = {"moenas": [sys.executable, "-m", "moenas"], "python": [sys.executable]}
LIMIT_S = 600
"""Of one command."""


def recipes(text: str) -> dict[str, str]:
    """Return the title of each recipe of a page -> its text."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def fenced(recipe: str) -> list[tuple[str, str]]:
    """Return the language and the text of each block of a recipe."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", recipe, re.MULTILINE | re.DOTALL)


def write_files(recipe: str, folder: Path) -> None:
    """Write the files that a recipe shows; a comment in the first line names each."""
    for language, block in fenced(recipe):
        if language == "json":
            (folder / CONFIG).write_text(block)
        elif language:
            (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block)


def commands(recipe: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a recipe with the lines below it."""
    for language, block in fenced(recipe):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] if not language else ():
            command, *lines = part.rstrip("\n").split("\n")
            yield command, lines


def printed(command: str, folder: Path) -> list[str]:
    """Return what a command prints in a folder, data first.

    Raises:
        RuntimeError: if the command fails.
    """
    program, *words = shlex.split(command)
    done = subprocess.run(
        [*PROGRAMS.get(program, [program]), *words],
        cwd=folder,
        env={**os.environ, "COLUMNS": str(COLUMNS), "MOENAS_STORAGE": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]


def main() -> None:
    """Write the page with new outputs."""
    text = PAGE.read_text(encoding="utf-8")
    for title, recipe in recipes(text).items():
        if len(sys.argv) > 1 and sys.argv[1] not in title:
            continue
        new = recipe
        with tempfile.TemporaryDirectory() as folder:
            write_files(recipe, Path(folder))
            for command, lines in commands(recipe):
                former = "\n".join([f"$ {command}", *lines])
                output = printed(command, Path(folder))
                new = new.replace(f"{former}\n", "\n".join([f"$ {command}", *output, ""]), 1)
        text = text.replace(recipe, new)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
