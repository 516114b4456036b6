"""`JobCounts`: how many jobs there are, and which ended since the last count; for monitoring a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from llama_stack_provider_moe.control.store.job_row import Job, as_job
from llama_stack_provider_moe.control.store.schema import jobs_table
from llama_stack_provider_moe.jobdir.state import ENDED, JobState


class GroupCounts(NamedTuple):
    """Counts of the jobs of one recipe and state."""

    jobs: int
    attempts: int  # processes that were started for these jobs
    lost: int  # how many of these processes were lost; a resumed job starts again from 0


@dataclass(frozen=True)
class JobCounts:
    """All jobs of a store at one moment.

    Attributes:
        groups: Counts by recipe and state; groups without jobs are left out.
        waits_since: When the job that has waited longest began to wait; None if no job waits.
        running: Jobs in progress.
        ended: Jobs that ended after the given moment; empty if no moment was given.
    """

    groups: dict[tuple[str, JobState], GroupCounts]
    waits_since: datetime | None
    running: Sequence[Job]
    ended: Sequence[Job]


def count_jobs(connection: Connection, since: datetime | None) -> JobCounts:
    """Count the jobs inside a transaction: one pass over the table and three index lookups."""
    table, state = jobs_table.c, jobs_table.c.state
    sums = select(
        table.recipe, state, func.count().label("jobs"), func.sum(table.attempts).label("attempts"),
        func.sum(table.lost).label("lost"),
    ).group_by(table.recipe, state)  # fmt: skip
    waiting = select(func.min(table.queued_at)).where(state == JobState.SCHEDULED.value)
    running = select(jobs_table).where(state == JobState.IN_PROGRESS.value)
    ended = select(jobs_table).where(state.in_([each.value for each in ENDED]))
    groups: dict[tuple[str, JobState], GroupCounts] = {}
    for row in connection.execute(sums):
        key = (row.recipe, JobState(row.state))  # several unknown states may become `unreadable`
        before = groups.get(key, GroupCounts(0, 0, 0))
        groups[key] = GroupCounts(before.jobs + row.jobs, before.attempts + row.attempts, before.lost + row.lost)
    return JobCounts(
        groups=groups,
        waits_since=connection.execute(waiting).scalar_one(),
        running=[as_job(row) for row in connection.execute(running)],
        ended=[] if since is None else [as_job(row) for row in connection.execute(ended.where(table.ended_at > since))],
    )
