"""Jobs that are of another job: exports, of the training job that they export. Their part of the store's transactions.

An export is inserted while its parent's row is locked, and a parent is deleted with its own row locked first and then
its exports': no export is left without its parent, and none is deleted while it waits or runs.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, delete, exists, insert, or_, select

from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.record import Job, as_job, find
from llama_stack_provider_moe.jobs.schema import jobs_table
from llama_stack_provider_moe.jobs.state import JobState


class NewJob(NamedTuple):
    """A job that is to be inserted.

    Attributes:
        id: unique among all owners' jobs.
        owner: who alone will see it.
        recipe: what kind of job, for lists.
        model: of which model, for lists.
        folder: absolute path of its folder.
        gpus: devices it asks for; None: one where the machine that runs it has any, else the CPU.
        parent: the completed job that it exports, of the same owner.
        executor: where it runs; None: on the supervisor's machine. Elsewhere it takes none of this machine's devices.
    """

    id: str
    owner: str
    recipe: str
    model: str
    folder: str
    gpus: int | None = None
    parent: str | None = None
    executor: str | None = None


def insert_job(connection: Connection, new: NewJob, turn: int) -> Job:
    """Insert a job as `scheduled`; an `IntegrityError` where its id is taken.

    Raises:
        NotFound: no such parent.
        Conflict: the parent has not completed.
    """
    if new.parent is not None:
        parent = find(connection, new.parent, lock=True)
        if parent.state != JobState.COMPLETED.value:
            raise Conflict(f"job {new.parent!r} is {parent.state}; only what a completed job leaves can be exported")
    moment = now()
    values = new._asdict() | {
        "state": JobState.SCHEDULED.value, "scheduled_at": moment, "queued_at": moment, "turn": turn,
    }  # fmt: skip
    connection.execute(insert(jobs_table).values(values))
    return as_job(find(connection, new.id))


def exports_of(connection: Connection, job_id: str, lock: bool = False) -> list[Row[Any]]:
    """Rows of a job's exports, the newest first; locked for this transaction with `lock`."""
    query = select(jobs_table).where(jobs_table.c.parent == job_id).order_by(jobs_table.c.seq.desc())
    return list(connection.execute(query.with_for_update() if lock else query))


def delete_family(
    connection: Connection, job_id: str, owner: str | None, first: Callable[[Job], None] | None
) -> list[Job]:
    """Delete a job that has ended and its exports, which must have too; the job as it was, then its exports.

    Raises:
        NotFound: no such job of this owner.
        Conflict: it, or an export of it, waits or runs.
    """
    row = find(connection, job_id, owner, lock=True)
    if not JobState(row.state).ended:
        raise Conflict(f"job {job_id!r} is {row.state}; cancel it before it is deleted")
    exports = exports_of(connection, job_id, lock=True)
    for export in exports:
        if not JobState(export.state).ended:
            raise Conflict(
                f"job {job_id!r} is being exported: job {export.id!r} is {export.state}; cancel that one before this "
                "one is deleted"
            )
    family = [as_job(each) for each in (row, *exports)]
    if first is not None:
        for job in reversed(family):
            first(job)
    connection.execute(delete(jobs_table).where(jobs_table.c.seq.in_([each.seq for each in (row, *exports)])))
    return family


def has_no_younger_export(moment: datetime) -> ColumnElement[bool]:
    """Condition on `jobs_table`: no export of the job waits, runs, or ended at `moment` or after."""
    export = jobs_table.alias()
    young = or_(export.c.ended_at.is_(None), export.c.ended_at >= moment)
    return ~exists().where(export.c.parent == jobs_table.c.id, young)
