"""Version 6: data sets that owners upload."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 5, whose jobs read the host's data sets only."""
    op.create_table(
        "moe_datasets",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("columns", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("moe_datasets_version", "moe_datasets", ["owner", "name", "sha256"], unique=True)
    op.create_index("moe_datasets_turn", "moe_datasets", ["owner", "name", "turn"])
