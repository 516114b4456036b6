"""Jobs that wait for other jobs (`waits`): parts of the store's transactions; `wait_table` has whole ones.

A job may name a job that has not completed. It then has a row for each such job, and the queue passes over it as long
as it has any. Once all of them have completed, the supervisor resolves its names, and removes the rows (`resolved`). If
one of them fails, is cancelled or is deleted, the supervisor fails the job. A job that ended while it waited keeps its
rows: if it is resumed, it waits again.

Jobs only wait for jobs that exist when they are inserted, so none wait in a circle.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, exists, insert, select, update

from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table, uses_table, waits_table
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.state import UNFINISHED, JobState

_J, _W = jobs_table.c, waits_table.c
_WILL_NOT_COMPLETE = (JobState.FAILED.value, JobState.CANCELLED.value)


class Wait(NamedTuple):
    """A job that another one waits for.

    Attributes:
        used: Its id.
        through_export: The export that it makes when it completes must complete too.
    """

    used: str
    through_export: bool = False


def waits_for_jobs() -> ColumnElement[bool]:
    """Condition on `jobs_table`: the job waits for another job, or its names are not resolved yet."""
    return exists().where(_W.job == _J.id)


def are_there(connection: Connection, job_id: str) -> bool:
    """Return whether a job waits for another job."""
    return connection.execute(select(_W.used).where(_W.job == job_id).limit(1)).first() is not None


def must_be_possible(rows: Iterable[TableRow]) -> None:
    """Raise `Conflict` if one of these jobs, for which another is to wait, has ended without completing."""
    for row in rows:
        if row.state in _WILL_NOT_COMPLETE:
            raise Conflict(f"job {row.id!r} is {row.state}; a job can't wait for it until it is resumed")


def add(connection: Connection, job_id: str, waits: Sequence[Wait], found: Mapping[str, TableRow]) -> None:
    """Have a new job wait.

    Args:
        connection: A connection inside a transaction.
        job_id: The new job.
        waits: What it waits for.
        found: The locked rows of those jobs, by id.
    """
    for wait in waits:
        used = found[wait.used]
        _wait(connection, job_id, used, wait.through_export)
        if wait.through_export and used.state == JobState.COMPLETED.value:
            pass_on(connection, used, _unfinished_exports(connection, used))


def pass_on(connection: Connection, parent: TableRow, exports: Sequence[TableRow]) -> None:
    """Have jobs that wait for what a job's exports make wait for these exports too, now that they exist.

    Args:
        connection: A connection inside a transaction.
        parent: The job, which has completed, locked.
        exports: Exports of it.
    """
    mine = (_W.used_seq == parent.seq, _W.through_export.is_(True))
    for job_id in connection.execute(select(_W.job).where(*mine)).scalars().all():
        for export in exports:
            _wait(connection, job_id, export, False)
            needed = {"job": job_id, "used": export.id, "until_completed": True}
            connection.execute(insert(uses_table).values(needed))
    connection.execute(update(waits_table).where(*mine).values(through_export=False))


def _wait(connection: Connection, job_id: str, used: TableRow, through_export: bool) -> None:
    values = {"job": job_id, "used": used.id, "used_seq": used.seq, "through_export": through_export}
    connection.execute(insert(waits_table).values(values))


def _unfinished_exports(connection: Connection, parent: TableRow) -> Sequence[TableRow]:
    mine = (_J.parent == parent.id, _J.state.in_([state.value for state in UNFINISHED]))
    return connection.execute(select(jobs_table).where(*mine).order_by(_J.seq)).all()


def forget(connection: Connection, job_ids: Sequence[str]) -> None:
    """Delete the rows of deleted jobs. Jobs that wait for a deleted job keep theirs, so that they don't start."""
    connection.execute(delete(waits_table).where(_W.job.in_(job_ids)))


def of_jobs(connection: Connection, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the jobs that have not completed yet, by the id of a job that waits for them; in their order."""
    if not job_ids:
        return {}
    query = (
        select(_W.job, _W.used)
        .outerjoin(jobs_table, _J.seq == _W.used_seq)
        .where(_W.job.in_(job_ids), _J.state.is_distinct_from(JobState.COMPLETED.value))
        .order_by(_W.job, _W.used_seq)
    )
    found: dict[str, list[str]] = {}
    for job_id, used in connection.execute(query):
        found.setdefault(job_id, []).append(used)
    return found


def must_not_be_broken(connection: Connection, job_id: str, revived: Sequence[str] = ()) -> None:
    """Raise `Conflict` if a job can't be resumed, because one that it waits for will not complete.

    Args:
        connection: A connection inside a transaction.
        job_id: The job.
        revived: Jobs that are resumed with it.
    """
    for used, state, _ in others(connection, job_id):
        if used not in revived and (why := why_broken(used, state, None)):
            raise Conflict(f"job {job_id!r} can't be resumed: {why}; resume that one first, or submit this one again")


def others(connection: Connection, job_id: str) -> list[tuple[str, str | None, str | None]]:
    """Return what a job waits for: id, state (None if it was deleted), and the reason of its end."""
    query = (
        select(_W.used, _J.state, _J.reason)
        .outerjoin(jobs_table, _J.seq == _W.used_seq)
        .where(_W.job == job_id)
        .order_by(_W.used_seq)
    )
    return [(used, state, reason) for used, state, reason in connection.execute(query)]


def why_broken(used: str, state: str | None, reason: str | None) -> str | None:
    """Say why a job that waits for another never starts; None if it may."""
    ends = {None: "was deleted", JobState.FAILED.value: "failed", JobState.CANCELLED.value: "was cancelled"}
    if state not in ends:
        return None
    why = f": {reason}" if reason else ""
    return f"job {used!r}, which it waits for, {ends[state]}{why}"
