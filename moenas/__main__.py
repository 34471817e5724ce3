"""`python -m moenas`: the same as the command `moenas`."""

from __future__ import annotations

from moenas.cli.commands import main

if __name__ == "__main__":
    main()
