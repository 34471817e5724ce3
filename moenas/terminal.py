"""Standard output and standard error: data and talk, as text that no terminal takes for orders."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from moenas.errors import MoenasError
from moenas.passwords import hide

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that move a cursor, change colours or the order of reading: not tab and newline."""
CLOSED_PIPE = 141
"""Exit code when the reader of stdout has gone: as of a process killed by SIGPIPE."""


class OutputError(MoenasError):
    """Standard output cannot be written."""


def plain(text: str) -> str:
    """Return a text with its control characters spelt as escapes."""
    return CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def prepare() -> None:
    """Let stdout and stderr spell what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str = "") -> None:
    """Write one line of talk to stderr, without passwords; a closed stderr is no reason to stop."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(plain(hide(text)), file=sys.stderr, flush=True)


def columns() -> int | None:
    """Return the width of stdout in columns, by the terminal or COLUMNS; None: as wide as one
    likes."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def emit(text: str) -> None:
    """Write lines of data to stdout; nothing happens if it was closed before the start.

    Raises:
        OutputError: if they cannot be written.
        SystemExit: with CLOSED_PIPE, if the reader has gone.
    """
    if sys.stdout is None:
        return
    try:
        print(plain(text))
    except OSError as error:
        raise _lost(error) from None


def flush() -> None:
    """Flush stdout; raises as `emit` does."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _lost(error) from None


def _lost(error: OSError) -> BaseException:
    """Give stdout up, so that nothing more fails at it, and return what to raise."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    if isinstance(error, BrokenPipeError) or error.errno == errno.EIO:  # a terminal that is gone
        return SystemExit(CLOSED_PIPE)
    return OutputError(f"stdout: cannot be written: {error.strerror or error}")


def to_json(data: Any, indent: int | None = 2) -> str:
    """Write plain data as JSON, with null for numbers that are not finite."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(entry) for key, entry in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(entry) for entry in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def command(words: Iterable[str], options: Mapping[str, object] | None = None) -> str:
    """Return a command line of moenas that can be pasted: a verb, arguments, then options.

    Arguments that begin with a hyphen come last, behind `--`. An option that is True is a bare
    flag, and a list repeats its option; None and False leave it out.
    """
    verb, *arguments = words
    given = []
    for name, value in (options or {}).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            given.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                given += [flag, str(one)]
    if any(word.startswith("-") for word in arguments):
        return shlex.join(["moenas", verb, *given, "--", *arguments])
    return shlex.join(["moenas", verb, *arguments, *given])
