"""Steps that bring an older store's tables up to this version: one module each, written with alembic's operations.

A step is never edited once it has been released: stores that took it are out there. It therefore names tables and
columns itself and imports nothing of ours. All steps run in one transaction, under the lock that `schema` takes;
SQLite and PostgreSQL both roll back changes of tables.
"""

from collections.abc import Callable

from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection

from llama_stack_provider_moe.jobs.migrations import to_2, to_3, to_4

# version -> the step that leads to it from the one before
STEPS: dict[int, Callable[[Operations], None]] = {2: to_2.upgrade, 3: to_3.upgrade, 4: to_4.upgrade}


def migrate(connection: Connection, version: int) -> None:
    """Bring tables of schema `version` up to the newest; the caller writes down that this was done."""
    operations = Operations(MigrationContext.configure(connection))
    for step in sorted(number for number in STEPS if number > version):
        STEPS[step](operations)
