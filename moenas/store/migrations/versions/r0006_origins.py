"""The sixth schema: origins of trials and of evaluations, and the wall time of each run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the tables; studies of earlier versions have no rows in them."""
    op.create_table(
        "moenas_enqueued",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "moenas_reuse",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("from_study", sa.String(512), nullable=False),
        sa.Column("from_trial", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "moenas_run",
        sa.Column(
            "study",
            sa.String(512),
            sa.ForeignKey("moenas_study.name", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("began_at", sa.String(32), primary_key=True),
        sa.Column("seconds", sa.Double, nullable=False),
    )
