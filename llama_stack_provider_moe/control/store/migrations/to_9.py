"""Version 9: jobs that wait for other jobs, and pipelines of jobs."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 8, whose jobs named completed jobs only."""
    op.add_column("moe_jobs", sa.Column("pipeline", sa.String(128)))
    op.create_index("moe_jobs_pipeline", "moe_jobs", ["pipeline"])
    op.create_table(
        "moe_waits",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("used", sa.String(128), primary_key=True),
        sa.Column("used_seq", sa.Integer, nullable=False),
        sa.Column("through_export", sa.Boolean, nullable=False),
    )
    op.create_index("moe_waits_used_seq", "moe_waits", ["used_seq"])
    op.create_table(
        "moe_pipelines",
        sa.Column("turn", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String(128), nullable=False, unique=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True)),
    )
    op.create_index("moe_pipelines_owner_turn", "moe_pipelines", ["owner", "turn"])
    op.create_table(
        "moe_parts",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("pipeline", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
    )
    op.create_index("moe_parts_pipeline_number", "moe_parts", ["pipeline", "number"], unique=True)
