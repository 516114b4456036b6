"""Jobs that belong together, as a sweep or a pipeline: parts of the store's transactions that both use.

The jobs of a group are ordinary jobs whose row names the group in a column of its own. A group has no state: it follows
from its jobs.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import Column, Connection, Table, func, select, update

from llama_stack_provider_moe.control.store import outbox
from llama_stack_provider_moe.control.store.job_row import Job
from llama_stack_provider_moe.control.store.owners import belongs_to
from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobdir.state import UNFINISHED, JobState

type Counts = dict[JobState, int]
_J = jobs_table.c


def find(connection: Connection, table: Table, group_id: str, owner: str | None, kind: str) -> TableRow:
    """Return the row of a group.

    Args:
        connection: A connection inside a transaction.
        table: The table of groups.
        group_id: The group.
        owner: Its owner; None for any owner.
        kind: The word for such a group, for the error.

    Raises:
        NotFound: The owner has none of that name.
    """
    query = select(table).where(table.c.id == group_id)
    if owner is not None:
        query = query.where(belongs_to(owner, table.c.owner))
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"{kind} {group_id!r} does not exist")
    return row


def page(
    connection: Connection, table: Table, owner: str | None, limit: int, after: str | None, kind: str
) -> Sequence[TableRow]:
    """Return a page of groups, newest first; see `find`. `after` is the last one of the previous page."""
    query = select(table).order_by(table.c.turn.desc()).limit(limit)
    if owner is not None:
        query = query.where(belongs_to(owner, table.c.owner))
    if after is not None:
        query = query.where(table.c.turn < find(connection, table, after, owner, kind).turn)
    return connection.execute(query).all()


def jobs_of(
    connection: Connection, column: Column[str | None], group_id: str, lock: bool = False
) -> Sequence[TableRow]:
    """Return the jobs of a group in the order of their submission; with `lock`, lock them for this transaction."""
    query = select(jobs_table).where(column == group_id).order_by(_J.seq)
    return connection.execute(query.with_for_update() if lock else query).all()


def must_be_cancellable(kind: str, group_id: str, state: JobState) -> None:
    """Raise `Conflict` if a group has ended without being cancelled."""
    if state.ended and state is not JobState.CANCELLED:
        raise Conflict(f"{kind} {group_id!r} has ended: it is {state.value}; there is nothing to cancel")


def cancel(connection: Connection, table: Table, row: TableRow, jobs: Sequence[TableRow], moment: datetime,
           reason: str) -> None:  # fmt: skip
    """Cancel every job of a group that waits or runs; a second call changes nothing, nor one about an ended group.

    Args:
        connection: A connection inside a transaction.
        table: The table of groups.
        row: The group.
        jobs: Its jobs, locked.
        moment: When the request came.
        reason: The reason of jobs that had not started.
    """
    if unfinished(counted(jobs)) is None:
        return
    for job in jobs:
        changes: dict[str, object] = {"cancel_requested_at": moment}
        if job.state == JobState.SCHEDULED.value:
            changes |= {"state": JobState.CANCELLED.value, "ended_at": moment, "reason": reason}
            outbox.write(connection, job, JobState.CANCELLED)
        elif job.state != JobState.IN_PROGRESS.value or job.cancel_requested_at is not None:
            continue
        connection.execute(update(jobs_table).where(_J.seq == job.seq).values(**changes))
    if row.cancel_requested_at is None:
        connection.execute(update(table).where(table.c.turn == row.turn).values(cancel_requested_at=moment))


def counts(connection: Connection, column: Column[str | None], group_ids: Sequence[str]) -> dict[str, Counts]:
    """Return the number of jobs in each state, by group."""
    found: dict[str, Counts] = {}
    query = select(column, _J.state, func.count()).where(column.in_(group_ids)).group_by(column, _J.state)
    for group_id, state, count in connection.execute(query) if group_ids else ():
        mine = found.setdefault(group_id, {})
        mine[JobState(state)] = mine.get(JobState(state), 0) + count
    return found


def counted(jobs: Iterable[Job | TableRow]) -> Counts:
    """Return the number of jobs in each state."""
    found: Counts = {}
    for job in jobs:
        state = JobState(job.state)
        found[state] = found.get(state, 0) + 1
    return found


def unfinished(counts: Counts) -> JobState | None:
    """Return the state of a group of which a job still waits or runs; None if all have ended."""
    if not any(counts.get(state) for state in UNFINISHED):
        return None
    has_begun = any(count for state, count in counts.items() if state is not JobState.SCHEDULED)
    return JobState.IN_PROGRESS if has_begun else JobState.SCHEDULED
