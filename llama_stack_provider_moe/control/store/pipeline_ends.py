"""The state of a pipeline, which follows from its jobs, and the message about its end.

The message is written in the transaction that ends the last of its jobs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, select

from llama_stack_provider_moe.control.store import group_rows, outbox, part_rows
from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table, pipelines_table
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.notify import PIPELINE_ENDED, PipelineNotify

log = logging.getLogger(__name__)
_J, _L = jobs_table.c, pipelines_table.c


@dataclass(frozen=True)
class PipelineRow:
    """A pipeline as the store knows it."""

    id: str
    owner: str
    created_at: datetime
    cancel_requested_at: datetime | None


class PipelineState(NamedTuple):
    """A pipeline, and the states of its jobs: its parts and their exports.

    Attributes:
        pipeline: Its row.
        counts: Number of its jobs in each state.
        lost: Names of parts whose jobs were deleted before they had completed.
    """

    pipeline: PipelineRow
    counts: group_rows.Counts
    lost: Sequence[str] = ()

    @property
    def state(self) -> JobState:
        """State of the pipeline: completed if all its jobs completed, and none was deleted before it had."""
        unfinished = group_rows.unfinished(self.counts)
        if unfinished is not None:
            return unfinished
        if self.pipeline.cancel_requested_at is not None and (self.counts.get(JobState.CANCELLED) or self.lost):
            return JobState.CANCELLED
        order = (JobState.UNREADABLE, JobState.FAILED, JobState.CANCELLED, JobState.COMPLETED)
        found = next((state for state in order if self.counts.get(state)), JobState.UNREADABLE)
        return JobState.FAILED if found is JobState.COMPLETED and self.lost else found


def tell(connection: Connection, pipeline_id: str | None, job_id: str) -> None:
    """Write the message about a pipeline if its last job has ended now, and its owner asked for one.

    Args:
        connection: Transaction that has ended a job.
        pipeline_id: Pipeline of that job; None: it has none.
        job_id: The job; the message is listed with it.
    """
    if pipeline_id is None:
        return
    # Locked: of two transactions that end its last two jobs, the second one sees both ends.
    row = connection.execute(select(pipelines_table).where(_L.id == pipeline_id).with_for_update()).first()
    if row is None or row.notify is None:
        return
    jobs = group_rows.jobs_of(connection, _J.pipeline, pipeline_id)
    counts = group_rows.counted(jobs)
    if group_rows.unfinished(counts) is not None:
        return
    try:
        asked = read_as(PipelineNotify, row.notify)
    except ValueError:  # damaged: the end of the job is recorded all the same
        log.warning("pipeline %s: nobody is told of its end, because its `notify` can't be read", pipeline_id)
        return
    lost = part_rows.lost(connection, [pipeline_id]).get(pipeline_id, [])
    states = {job.id: job.state for job in jobs}
    parts = part_rows.of_pipeline(connection, pipeline_id)
    outbox.add(connection, job_id, asked.url, PIPELINE_ENDED, {
        "pipeline_uuid": pipeline_id,
        "status": PipelineState(as_pipeline(row), counts, lost).state.value,
        "jobs": {state.value: count for state, count in counts.items()},
        "parts": {part.name: {"job_uuid": part.job, "status": states[part.job]} for part in parts
                  if part.job in states},
        "lost": lost,
    })  # fmt: skip


def as_pipeline(row: TableRow) -> PipelineRow:
    """Return a row as a pipeline."""
    return PipelineRow(row.id, row.owner, row.created_at, row.cancel_requested_at)
