"""Version 10: pipelines that tell of their end."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 9, whose pipelines told nobody."""
    op.add_column("moe_pipelines", sa.Column("notify", sa.Text))
