"""The command `moenas`, and `python -m moenas`: Ctrl-C is heeded before anything is imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def _end(number: int, frame: object) -> None:
    """End this process at once: an import that is interrupted leaves a traceback."""
    os.write(2, b"stopped\n")
    os._exit(128 + number)


def main(prepare: Callable[[], None] = lambda: None) -> None:
    """Run the command line, after `prepare`, which may import as much as it does."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:  # not where the caller has it ignored, as a shell does for background jobs
        signal.signal(signal.SIGINT, _end)
    prepare()
    from moenas.cli import commands

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    commands.main()


if __name__ == "__main__":
    main()
