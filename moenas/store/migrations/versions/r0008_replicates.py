"""The eighth schema: finalists that were trained again with further seeds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Create the table; studies of earlier versions have no rows in it."""
    op.create_table(
        "moenas_replicate",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("seed", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("recorded_at", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("evaluation", sa.JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )
