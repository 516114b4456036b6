"""Version 7: the GPU time that owners used, for their limits."""

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 6, which counted no GPU time."""
    op.create_table(
        "moe_gpu_use",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("moe_gpu_use_owner_ended_at", "moe_gpu_use", ["owner", "ended_at"])
    op.create_index("moe_gpu_use_ended_at", "moe_gpu_use", ["ended_at"])
