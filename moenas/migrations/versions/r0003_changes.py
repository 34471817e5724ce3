"""The third schema: a study keeps what was changed of it after its start."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column."""
    op.add_column("moenas_study", sa.Column("changes", sa.JSON))
