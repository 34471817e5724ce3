"""The process of a driver: it runs a command of moenas and leaves its exit code in a file.

A server that was restarted is not the parent of its drivers, so it cannot ask the system how one
ended. A process that is killed leaves no file.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

LOG_VARIABLE = "MOENAS_DRIVER_LOG"
"""Environment variable with the texts of `--log`, as a JSON list: they may hold passwords."""


def main() -> None:
    """Run `moenas` with a verb and its arguments, which stand behind the name of the file."""
    code_file, verb, *words = sys.argv[1:]
    logs = json.loads(os.environ.pop(LOG_VARIABLE, "[]"))
    sys.argv = ["moenas", verb, *(word for text in logs for word in ("--log", text)), *words]
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
