"""Version 3: the job that an export belongs to."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 2, which had no exports."""
    op.add_column("moe_jobs", sa.Column("parent", sa.String(128)))
    op.create_index("moe_jobs_parent", "moe_jobs", ["parent"])
