"""What is written reaches stdout whole, as plain text, or the failure is said and has an exit code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moenas.terminal import command, plain, to_json

pytestmark = pytest.mark.integration


def moenas(words: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    line = f"{shlex.quote(sys.executable)} -m moenas {words} {redirect}"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_control_characters_are_spelt() -> None:
    assert plain("a\x1b[31mred\x07\x9b0m\u202eb\tc\nd\r") == (
        "a\\x1b[31mred\\x07\\x9b0m\\u202eb\tc\nd\\r"
    )


def test_json_has_null_for_what_is_no_number() -> None:
    assert to_json({"a": [float("inf"), 1.5], "b": float("nan")}, None) == (
        '{"a": [null, 1.5], "b": null}'
    )


def test_a_name_that_begins_with_a_hyphen_stands_behind_two() -> None:
    assert command(["show", "x", "3"], {"storage": "u"}) == "moenas show x 3 --storage u"
    assert command(["show", "-x", "3"], {"storage": "u"}) == "moenas show --storage u -- -x 3"
    assert command(["front", "--storage"]) == "moenas front -- --storage"


def test_a_full_disk_is_one_line() -> None:
    done = moenas("schema", "> /dev/full")
    assert done.returncode == 1
    assert done.stderr == "moenas: stdout: cannot be written: No space left on device\n"


def test_a_reader_that_goes_ends_the_command_as_a_signal_would() -> None:
    done = moenas("schema", "| head -c 10")
    assert (done.returncode, done.stderr) == (141, "")


def test_with_stderr_closed_nothing_goes_among_the_data(tmp_path: Path) -> None:
    space = tmp_path / "s.yaml"
    done = moenas(f"init {space}", "2>&-")
    assert (done.returncode, done.stdout) == (0, "")
    assert moenas(f"status --storage sqlite:///{tmp_path}/none.db", "2>&-").stdout == ""
    assert moenas(f"check {space} -o json", ">&- 2>&-").returncode == 0


def test_an_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    name = tmp_path / "gr\u00f6\u00dfe.yaml"
    done = moenas(f"init {shlex.quote(str(name))}", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert "gr\\xf6\\xdfe.yaml" in done.stderr


def test_the_version_is_printed() -> None:
    import moenas as package

    assert moenas("--version").stdout == f"moenas {package.__version__}\n"


def test_a_traceback_holds_no_password() -> None:
    url = "postgresql://bob:Tr0ub4dor@127.0.0.1:1/db"
    code = (
        f"import sys; sys.argv = ['moenas', 'status', '--storage', {url!r}]\n"
        "from moenas.cli import commands as cli\nfrom moenas.store import database\n"
        f"def broken(self, *a): raise ValueError('cannot use {url}')\n"
        "database.Database.__init__ = broken; cli.main()\n"
    )
    environment = {**os.environ, "MOENAS_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert "ValueError: cannot use postgresql://bob:***@127.0.0.1:1/db" in done.stderr
    assert "Tr0ub4dor" not in done.stderr + done.stdout


@pytest.mark.parametrize("escape", ["\x1b]0;owned\x07", "\x1b[2J"])
def test_no_escape_of_a_file_reaches_the_terminal(tmp_path: Path, escape: str) -> None:
    (tmp_path / "bad.py").write_text(f"raise ValueError({escape!r})\n")
    (tmp_path / f"{escape[1:3]}\x1b.py").write_text("raise ValueError('x')\n")
    for path in tmp_path.glob("*.py"):
        done = moenas(f"check {shlex.quote(str(path))}")
        assert done.returncode == 2
        assert "\x1b" not in done.stderr + done.stdout
