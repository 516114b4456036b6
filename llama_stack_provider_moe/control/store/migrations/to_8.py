"""Version 8: labels and notes of jobs, sweeps, and messages about ends of jobs."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 7, whose jobs had none of these."""
    for column in (
        sa.Column("note", sa.Text),
        sa.Column("sweep", sa.String(128)),
        sa.Column("notify", sa.Text),
    ):
        op.add_column("moe_jobs", column)
    op.create_index("moe_jobs_sweep", "moe_jobs", ["sweep"])
    op.create_table(
        "moe_labels",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(256), nullable=False),
    )
    op.create_index("moe_labels_key_value", "moe_labels", ["key", "value", "job"])
    _create_sweeps(op)
    _create_webhooks(op)


def _create_sweeps(op: Operations) -> None:
    op.create_table(
        "moe_sweeps",
        sa.Column("turn", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String(128), nullable=False, unique=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True)),
        sa.Column("max_parallel", sa.Integer, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
    )
    op.create_index("moe_sweeps_owner_turn", "moe_sweeps", ["owner", "turn"])
    op.create_table(
        "moe_trials",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("sweep", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("chosen", sa.Text, nullable=False),
        sa.Column("is_read", sa.Boolean, nullable=False),
        sa.Column("pruned_at", sa.Integer),
        sa.Column("pruner_state", sa.Text, nullable=False),
    )
    op.create_index("moe_trials_sweep_number", "moe_trials", ["sweep", "number"], unique=True)
    op.create_index("moe_trials_is_read", "moe_trials", ["is_read"])
    op.create_table(
        "moe_trial_figures",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("value", sa.Double),
    )


def _create_webhooks(op: Operations) -> None:
    op.create_table(
        "moe_webhooks",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("job", sa.String(128), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("told", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("moe_webhooks_state_due_at", "moe_webhooks", ["state", "due_at"])
    op.create_index("moe_webhooks_job", "moe_webhooks", ["job"])
