"""Write the transcripts and the picture of a front in the documents from a real study.

`make transcripts` runs the study `tiny` if it is not finished. Then it runs every command behind `$
moenas` in README.md and docs/, and replaces its output. An output that ends with `...` keeps its
number of lines. Commands that write or serve are left alone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "getting_started.md"]
COLUMNS = 110
"""Width of the terminal that the transcripts show."""
RUN_AGAIN = ("check", "status", "front", "show")
"""Commands that only read."""
MOENAS = [sys.executable, "-m", "moenas"]


def output(command: str, folder: Path) -> list[str]:
    """Return the lines that a command prints, data first."""
    words = shlex.split(command.partition("#")[0])
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        [*MOENAS, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return each command behind `$ moenas` of a page, with the lines under it."""
    shell_blocks = []
    for i, fence in enumerate(re.split(r"^```.*\n", text, flags=re.MULTILINE)):
        for part in re.split(r"^(?=\$ )", fence if i % 2 else "", flags=re.MULTILINE):
            if part.startswith("$ moenas"):
                head, *lines = part.rstrip("\n").split("\n")
                shell_blocks.append((head[2:], lines))
    return shell_blocks


def renewed(text: str, folder: Path) -> str:
    """Return a page with new outputs of its commands."""
    for command, lines in blocks(text):
        if command.split()[1] not in RUN_AGAIN or not any(lines):
            continue
        new = output(command, folder)
        if "..." in lines:
            new = [*new[: lines.index("...")], "..."]
        former = "\n".join([f"$ {command}", *lines]).rstrip("\n")
        text = text.replace(former, "\n".join([f"$ {command}", *new]))
    return text


def main() -> None:
    """Renew all pages from the study in the folder that is named, or here."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    subprocess.run([*MOENAS, "run", "tiny"], cwd=folder, check=True)
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    from front_picture import draw

    draw(folder)


if __name__ == "__main__":
    main()
