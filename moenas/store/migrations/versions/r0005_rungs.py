"""The fifth schema: results at the rungs of training, and stopped candidates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

VIEW = "pareto_front"
STATUS = "moenas_evaluation_status_check"
"""The name that PostgreSQL gave the nameless constraint of the first schema."""
STATUSES = "status IN ('complete', 'failed', 'infeasible', 'stopped')"


def upgrade() -> None:
    """Create the table of rungs, and let an evaluation have the status `stopped`."""
    op.create_table(
        "moenas_rung",
        sa.Column("study", sa.String(512), primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("rung", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("val_loss", sa.Double, nullable=False),
        sa.Column("known", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("recorded_at", sa.String(32), nullable=False),
        sa.Column("promoted_at", sa.String(32)),
        sa.Column("evaluation", sa.JSON(none_as_null=True)),
        sa.Column("checkpoint_sha256", sa.String(64)),
        sa.ForeignKeyConstraint(
            ["study", "trial"],
            ["moenas_candidate.study", "moenas_candidate.trial"],
            ondelete="CASCADE",
        ),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(STATUS, "moenas_evaluation")
        op.create_check_constraint(STATUS, "moenas_evaluation", STATUSES)
        return
    _copy_on_sqlite()


def _copy_on_sqlite() -> None:
    """Copy the evaluations to a table with the new constraint: SQLite cannot alter one.

    The view reads the table, so it is dropped before the copy and created again from its own text.
    """
    connection = op.get_bind()
    text = sa.text("SELECT sql FROM sqlite_master WHERE type = 'view' AND name = :name")
    view = connection.execute(text, {"name": VIEW}).scalar_one()
    op.execute(f"DROP VIEW {VIEW}")
    # Alembic leaves the nameless constraint out of the copy.
    constraint = sa.CheckConstraint(STATUSES, name=STATUS)
    table = "moenas_evaluation"
    with op.batch_alter_table(table, recreate="always", table_args=(constraint,)):
        pass
    op.execute(sa.text(view.replace(":", r"\:")))
