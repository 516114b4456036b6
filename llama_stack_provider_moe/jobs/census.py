"""`Census`: how many jobs there are and what happened since the last count, for whoever watches a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from llama_stack_provider_moe.jobs.record import Job, as_job
from llama_stack_provider_moe.jobs.schema import jobs_table
from llama_stack_provider_moe.jobs.state import ENDED, JobState


class Group(NamedTuple):
    """Jobs of one recipe and state."""

    jobs: int
    attempts: int  # processes that were started for them
    lost: int  # of these, those that were lost; a resumed job counts anew


@dataclass(frozen=True)
class Census:
    """All jobs of a store at one moment.

    Attributes:
        groups: by recipe and state; a group without a job is left out.
        waits_since: when the job that waits longest began to; None: none waits.
        running: jobs in progress.
        ended: jobs that ended after the moment that was asked for; none where none was.
    """

    groups: dict[tuple[str, JobState], Group]
    waits_since: datetime | None
    running: Sequence[Job]
    ended: Sequence[Job]


def taken(connection: Connection, since: datetime | None) -> Census:
    """Count inside a transaction: one pass over the table, and three looks at an index."""
    table, state = jobs_table.c, jobs_table.c.state
    sums = select(
        table.recipe, state, func.count().label("jobs"), func.sum(table.attempts).label("attempts"),
        func.sum(table.lost).label("lost"),
    ).group_by(table.recipe, state)  # fmt: skip
    waiting = select(func.min(table.queued_at)).where(state == JobState.SCHEDULED.value)
    running = select(jobs_table).where(state == JobState.IN_PROGRESS.value)
    ended = select(jobs_table).where(state.in_([each.value for each in ENDED]))
    return Census(
        groups={
            (row.recipe, JobState(row.state)): Group(row.jobs, row.attempts, row.lost)
            for row in connection.execute(sums)
        },
        waits_since=connection.execute(waiting).scalar_one(),
        running=[as_job(row) for row in connection.execute(running)],
        ended=[] if since is None else [as_job(row) for row in connection.execute(ended.where(table.ended_at > since))],
    )
