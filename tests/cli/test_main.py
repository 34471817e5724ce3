"""Ctrl-C at any moment of a command is one line and exit code 130."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
import moenas.__main__ as command

class PressesCtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {library!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, PressesCtrlC())
sys.argv = ["moenas", *{words!r}]
command.main()
"""


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("typer", ["check", "tiny"]),
        ("moenas.cli.options", ["check", "tiny"]),
        ("torch", ["check", "tiny"]),
        ("optuna", ["run", "tiny", "--workers", "inline"]),
    ],
)
def test_ctrl_c_while_a_library_is_imported(tmp_path: Path, library: str, words: list[str]) -> None:
    code = SCRIPT.format(library=library, words=words)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stderr.splitlines()[-1] == "stopped"
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())
