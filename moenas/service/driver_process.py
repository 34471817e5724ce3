"""The process of a driver: it runs a command of moenas and leaves its exit code in a file.

A server that was restarted is not the parent of its drivers, so it cannot ask the system how one
ended. A process that is killed leaves no file.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run `moenas` with the arguments behind the first, which names the file."""
    code_file, *words = sys.argv[1:]
    sys.argv = ["moenas", *words]
    code: object = 1
    try:
        runpy.run_module("moenas", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    finally:
        number = 0 if code is None else code if isinstance(code, int) else 1
        draft = Path(f"{code_file}.draft")
        draft.write_text(str(number), encoding="ascii")
        os.replace(draft, code_file)


if __name__ == "__main__":
    main()
