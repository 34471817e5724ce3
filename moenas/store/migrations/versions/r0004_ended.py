"""The fourth schema: why a study is over."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the table; a study that ended before this version has no row."""
    op.create_table(
        "moenas_ended",
        sa.Column(
            "study",
            sa.String(512),
            sa.ForeignKey("moenas_study.name", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("reason", sa.String(16), nullable=False),
        sa.Column("ended_at", sa.String(32), nullable=False),
    )
