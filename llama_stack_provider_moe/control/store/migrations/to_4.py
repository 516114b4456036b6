"""Version 4: jobs that run on a cluster."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 3, whose jobs all ran on the supervisor's machine."""
    op.add_column("moe_jobs", sa.Column("executor", sa.String(16)))
    op.add_column("moe_jobs", sa.Column("run", sa.String(128)))
