"""The command line inside this process, with what it writes and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from moenas.cli import commands


@dataclass
class Result:
    """The end of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs one command line, given as its words."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["moenas", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            commands.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run
