"""Our schema by version: each change of the tables is one more file in versions/.

A new version is a file in versions/ with the next number and its number at the end of REVISIONS;
`tables.py` then says what the tables look like afterwards. A released version never changes.
"""

from __future__ import annotations

REVISIONS = (
    *("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010"),
    "0011",
)
"""Every version of the schema, oldest first; the last one is what this moenas reads and writes."""

VERSION_TABLE = "moenas_alembic_version"
"""Where the version stands. Alembic's own name for it belongs to Optuna in a shared database."""
