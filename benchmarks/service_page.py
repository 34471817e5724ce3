"""Write the transcript of docs/service.md: its commands are run against a real server.

`python benchmarks/service_page.py` runs every command behind `$ ` of the first block, in an empty
folder with the Python of the page as submit.py. It replaces the former outputs. The port of the
page is replaced by a free one meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "service.md"
PORT = "8321"
MARK = "moenas-transcript-mark"
LONGEST_S = 240
"""Seconds for all commands together."""


def blocks(text: str) -> tuple[list[str], str]:
    """Return the commands of the first block, and the Python of the page."""
    shell = re.search(r"^```\n(\$ .*?)^```$", text, re.MULTILINE | re.DOTALL)
    python = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if shell is None or python is None:
        raise SystemExit(f"{PAGE}: no block of commands, or none of Python")
    commands = [line[2:] for line in shell[1].splitlines() if line.startswith("$ ")]
    return commands, python[1]


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def transcript(text: str, folder: Path) -> list[str]:
    """Run the commands in one shell; return the lines of the block."""
    commands, python = blocks(text)
    port = free_port()
    (folder / "submit.py").write_text(python.replace(PORT, port), encoding="utf-8")
    script = "".join(f"{c.replace(PORT, port)}\necho {MARK}\n" for c in commands)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("MOENAS_STORAGE", "MOENAS_TOKEN", "MOENAS_SERVER"):
        environment.pop(name, None)
    shell = subprocess.Popen(
        ["bash"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    stop = "kill -TERM %1; wait %1\n"
    try:
        printed, _ = shell.communicate(script + stop, timeout=LONGEST_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    printed = re.sub(r"key=\S+", "key=...", printed.replace(port, PORT))
    outputs = printed.split(f"{MARK}\n")
    lines = []
    for command, output in zip(commands, outputs, strict=False):
        lines += [f"$ {command}", *output.rstrip().splitlines()]
    return lines


def renewed(text: str, folder: Path) -> str:
    """Return the page with new outputs."""
    block = "\n".join(transcript(text, folder))
    return re.sub(
        r"^```\n\$ .*?^```$", lambda _: f"```\n{block}\n```", text, count=1, flags=re.M | re.S
    )


def main() -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(renewed(text, Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
