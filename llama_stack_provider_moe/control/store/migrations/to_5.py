"""Version 5: the store's id, and which job needs the files of which."""

import uuid

import sqlalchemy as sa
from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Migrate from version 4, which recorded only the model that a job needs.

    The store does not say whether a job trains an adapter. So the model counts as needed for as long as the job exists:
    it is better to keep too much than too little.
    """
    identity = op.create_table("moe_store", sa.Column("id", sa.String(36), primary_key=True))
    op.bulk_insert(identity, [{"id": str(uuid.uuid4())}])
    op.create_table(
        "moe_uses",
        sa.Column("job", sa.String(128), primary_key=True),
        sa.Column("used", sa.String(128), primary_key=True),
        sa.Column("until_completed", sa.Boolean, nullable=False),
    )
    op.create_index("moe_uses_used", "moe_uses", ["used"])
    op.execute(
        "INSERT INTO moe_uses (job, used, until_completed)"
        " SELECT job.id, used.id, job.recipe IN ('export', 'routing_analysis') FROM moe_jobs job JOIN moe_jobs used"
        " ON job.model LIKE '/%' AND job.id <> used.id"
        " AND substr(job.model, 1, length(used.folder) + 1) = used.folder || '/'"
    )
