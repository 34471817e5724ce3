"""The tenth schema: predictors of latency, each for one device and one workload."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Create the table; a database of an earlier version has no calibration."""
    op.create_table(
        "moenas_calibration",
        sa.Column("parts_sha256", sa.String(64), primary_key=True),
        sa.Column("workload", sa.String(255), primary_key=True),
        sa.Column("objective", sa.String(255), nullable=False),
        sa.Column("made_at", sa.String(32), nullable=False),
        sa.Column("calibration", sa.JSON, nullable=False),
    )
