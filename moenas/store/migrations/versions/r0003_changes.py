"""The third schema: changes of a study after its start."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "moenas_change",
        sa.Column(
            "study",
            sa.String(512),
            sa.ForeignKey("moenas_study.name", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("changed_at", sa.String(32), nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("before", sa.String(64), nullable=False),
        sa.Column("after", sa.String(64), nullable=False),
    )
