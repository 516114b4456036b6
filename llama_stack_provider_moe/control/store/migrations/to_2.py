"""Version 2: turns in the queue, lost processes, what stopped a job, devices."""

import sqlalchemy as sa
from alembic.operations import Operations

_NEW = ("queued_at", "lost", "turn")  # filled for existing jobs, then set to not null


def upgrade(op: Operations) -> None:
    """Migrate from version 1. Every job keeps its place, because until now turns followed submission."""
    time = sa.DateTime(timezone=True)
    for column in (
        sa.Column("queued_at", time),
        sa.Column("lost", sa.Integer),
        sa.Column("stopped_by", sa.String(64)),
        sa.Column("gpus", sa.Integer),
        sa.Column("devices", sa.Text),
        sa.Column("turn", sa.Integer),
    ):
        op.add_column("moe_jobs", column)
    op.execute("UPDATE moe_jobs SET queued_at = scheduled_at, lost = 0, turn = seq")
    # SQLite can't alter a column, so alembic copies the table; without this option it would drop AUTOINCREMENT.
    with op.batch_alter_table("moe_jobs", table_kwargs={"sqlite_autoincrement": True}) as jobs:
        for name in _NEW:
            jobs.alter_column(name, nullable=False)
    op.create_index("moe_jobs_state_owner_turn", "moe_jobs", ["state", "owner", "turn"])
    op.create_index("moe_jobs_owner_started_at", "moe_jobs", ["owner", "started_at"])
    op.create_index("moe_jobs_ended_at", "moe_jobs", ["ended_at"])
    op.add_column("moe_supervisor", sa.Column("turns", sa.Integer, server_default="0", nullable=False))
    op.execute("UPDATE moe_supervisor SET turns = (SELECT COALESCE(MAX(seq), 0) FROM moe_jobs)")
