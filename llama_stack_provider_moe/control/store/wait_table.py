"""`WaitTable`: jobs that wait for other jobs, for the supervisor and for answers; see `wait_rows`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Engine, delete, insert, select

from llama_stack_provider_moe.control.store import wait_rows
from llama_stack_provider_moe.control.store.job_row import Job, as_job
from llama_stack_provider_moe.control.store.schema import jobs_table, uses_table, waits_table
from llama_stack_provider_moe.control.store.transitions import Fence, locked
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.state import JobState

if TYPE_CHECKING:
    from llama_stack_provider_moe.control.store.references import Uses

_J, _W = jobs_table.c, waits_table.c


class Waiting(NamedTuple):
    """The scheduled jobs that wait for jobs, as far as something is to be done.

    Attributes:
        ready: Jobs for which all others have completed.
        broken: Jobs of which one will not complete, and why.
    """

    ready: list[Job]
    broken: list[tuple[Job, str]]


class WaitTable:
    """Jobs that wait for jobs. Each method is one transaction.

    Args:
        reading: Engine for transactions that only read.
        writing: Engine for transactions that write.
    """

    def __init__(self, reading: Engine, writing: Engine) -> None:
        self._reading = reading
        self._writing = writing

    def of_jobs(self, job_ids: Sequence[str]) -> dict[str, list[str]]:
        """Return the jobs that have not completed yet, by the id of a job that waits for them."""
        with self._reading.begin() as connection:
            return wait_rows.of_jobs(connection, job_ids)

    def due(self) -> Waiting:
        """Return scheduled jobs that wait for others and can either start or never will; oldest first."""
        waits = (
            select(jobs_table).where(_J.state == JobState.SCHEDULED.value, wait_rows.waits_for_jobs()).order_by(_J.seq)
        )
        found = Waiting([], [])
        with self._reading.begin() as connection:
            for row in connection.execute(waits).all():
                others = wait_rows.others(connection, row.id)
                why = next(filter(None, (wait_rows.why_broken(*other) for other in others)), None)
                if why is not None:
                    found.broken.append((as_job(row), why))
                elif all(state == JobState.COMPLETED.value for _, state, _ in others):
                    found.ready.append(as_job(row))
        return found

    def resolved(self, job: Job, uses: "Uses", fence: Fence) -> None:
        """Have a job wait no longer: its names are resolved.

        Args:
            job: The job as it was seen.
            uses: The jobs whose files it needs.
            fence: What must still hold.

        Raises:
            Conflict: One of the jobs has not completed, or was deleted; `Superseded`, `LeaseLost`: see `Fence`.
        """
        with self._writing.begin() as connection:
            locked(connection, job.id, fence)
            if any(state != JobState.COMPLETED.value for _, state, _ in wait_rows.others(connection, job.id)):
                raise Conflict(f"job {job.id!r} waits again: a job that it waits for has changed meanwhile")
            connection.execute(delete(waits_table).where(_W.job == job.id))
            connection.execute(delete(uses_table).where(uses_table.c.job == job.id))
            needed = dict.fromkeys(uses.to_complete, True) | dict.fromkeys(uses.always, False)
            there = set(connection.execute(select(_J.id).where(_J.id.in_(needed))).scalars())
            rows = [
                {"job": job.id, "used": used, "until_completed": until}
                for used, until in needed.items()
                if used in there
            ]
            if rows:
                connection.execute(insert(uses_table), rows)
