"""Steps that migrate an older store's tables to this version: one module each, written with alembic's operations.

A released step is never edited, because stores that took it exist. So a step names tables and columns itself and
imports nothing from this package. All steps run in one transaction, under the lock that `schema` takes. SQLite and
PostgreSQL both roll back changes of tables.
"""

from collections.abc import Callable

from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection

from llama_stack_provider_moe.control.store.migrations import to_2, to_3, to_4, to_5, to_6, to_7, to_8, to_9, to_10

# version -> the step that leads to it from the previous version
STEPS: dict[int, Callable[[Operations], None]] = {
    2: to_2.upgrade,
    3: to_3.upgrade,
    4: to_4.upgrade,
    5: to_5.upgrade,
    6: to_6.upgrade,
    7: to_7.upgrade,
    8: to_8.upgrade,
    9: to_9.upgrade,
    10: to_10.upgrade,
}


def migrate(connection: Connection, version: int) -> None:
    """Migrate tables of schema `version` to the newest; the caller records the new version."""
    operations = Operations(MigrationContext.configure(connection))
    for step in sorted(number for number in STEPS if number > version):
        STEPS[step](operations)
