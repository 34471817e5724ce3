"""The eleventh schema: the calibrations that each study uses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Create the table; the next run of a study of an earlier version fills it."""
    op.create_table(
        "moenas_study_calibration",
        sa.Column(
            "study",
            sa.String(512),
            sa.ForeignKey("moenas_study.name", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("workload", sa.String(255), primary_key=True),
        sa.Column("taken_at", sa.String(32), nullable=False),
        sa.Column("calibration", sa.JSON, nullable=False),
    )
