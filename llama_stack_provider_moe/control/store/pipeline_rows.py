"""`PipelineTable`: pipelines, whose parts are ordinary jobs.

A pipeline has no state of its own: it follows from its jobs. All parts are inserted in one transaction. A part that
names an earlier one waits for it (`wait_rows`). The exports that parts make when they complete belong to the pipeline
too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Engine, insert, update
from sqlalchemy.exc import IntegrityError

from llama_stack_provider_moe.control.store import (
    group_rows,
    limits,
    parent_jobs,
    part_rows,
    pipeline_ends,
    queue,
    transitions,
    wait_rows,
)
from llama_stack_provider_moe.control.store.job_row import Job, as_job
from llama_stack_provider_moe.control.store.parent_jobs import NewJob
from llama_stack_provider_moe.control.store.part_rows import Part
from llama_stack_provider_moe.control.store.pipeline_ends import PipelineState, as_pipeline
from llama_stack_provider_moe.control.store.schema import jobs_table, parts_table, pipelines_table
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

CANCELLED_WAITING = "cancelled with its pipeline before it started"
_RESUMED_FROM = (JobState.FAILED, JobState.CANCELLED)
_J, _L = jobs_table.c, pipelines_table.c


class NewPipeline(NamedTuple):
    """A pipeline to be inserted.

    Attributes:
        id: Unique among the pipelines of all owners.
        owner: The only user who will see it.
        parts: Its parts, by name; each waits only for parts before it.
        notify: JSON of whom to tell of its end; None: nobody.
    """

    id: str
    owner: str
    parts: Sequence[tuple[NewJob, str]]
    notify: str | None = None


class PipelineDetail(NamedTuple):
    """A pipeline, its parts in their order, its jobs by id, and what its jobs wait for."""

    found: PipelineState
    parts: list[Part]
    jobs: dict[str, Job]
    waits: dict[str, list[str]]

    def exports_of(self, job_id: str) -> list[Job]:
        """Return the exports that a part made, oldest first."""
        return [job for job in self.jobs.values() if job.parent == job_id]


Jobs = list[Job]  # inside the class, `PipelineTable.list` hides the built-in


class PipelineTable:
    """Pipelines in the store. Each method is one transaction. `owner=None` means any owner.

    Args:
        reading: Engine for transactions that only read.
        writing: Engine for transactions that write.
    """

    def __init__(self, reading: Engine, writing: Engine) -> None:
        self._reading = reading
        self._writing = writing

    def add(self, new: NewPipeline, owner_limits: LimitsConfig) -> Jobs:
        """Insert a pipeline and all its parts, `scheduled` in their order.

        Raises:
            OverLimit: The jobs would exceed a limit of their owner.
            NotFound: A job that one of them needs was deleted.
            Conflict: The name of the pipeline or of one of its jobs is taken, or a job that one waits for has ended.
        """
        try:
            with self._writing.begin() as connection:
                turn = queue.next_turn(connection)
                limits.must_have_left(connection, new.owner, owner_limits, len(new.parts))
                connection.execute(insert(pipelines_table).values(
                    turn=turn, id=new.id, owner=new.owner, created_at=now(), notify=new.notify,
                ))  # fmt: skip
                jobs = []
                for number, (job, name) in enumerate(new.parts):
                    jobs.append(parent_jobs.insert_job(connection, job, queue.next_turn(connection)))
                    part = {"job": job.id, "pipeline": new.id, "number": number, "name": name}
                    connection.execute(insert(parts_table).values(part))
                return jobs
        except IntegrityError:
            raise Conflict(
                f"pipeline {new.id!r}, or a job with its name and that of a part, exists already; leave out "
                "pipeline_uuid or choose another"
            ) from None

    def list(self, owner: str | None, limit: int, after: str | None = None) -> list[PipelineState]:
        """Return a page of pipelines, newest first; `after` is the last one of the previous page.

        Raises:
            NotFound: There is no pipeline `after`.
        """
        with self._reading.begin() as connection:
            rows = group_rows.page(connection, pipelines_table, owner, limit, after, "pipeline")
            ids = [row.id for row in rows]
            counts, lost = group_rows.counts(connection, _J.pipeline, ids), part_rows.lost(connection, ids)
            return [PipelineState(as_pipeline(row), counts.get(row.id, {}), lost.get(row.id, ())) for row in rows]

    def get(self, pipeline_id: str, owner: str | None) -> PipelineDetail:
        """Return a pipeline with its jobs; raise `NotFound` if the owner has none of that name."""
        with self._reading.begin() as connection:
            pipeline = as_pipeline(group_rows.find(connection, pipelines_table, pipeline_id, owner, "pipeline"))
            parts = part_rows.of_pipeline(connection, pipeline_id)
            jobs = {row.id: as_job(row) for row in group_rows.jobs_of(connection, _J.pipeline, pipeline_id)}
            waits = wait_rows.of_jobs(connection, list(jobs))
            lost = part_rows.lost(connection, [pipeline_id]).get(pipeline_id, ())
            state = PipelineState(pipeline, group_rows.counted(jobs.values()), lost)
            return PipelineDetail(state, parts, jobs, waits)

    def request_cancel(self, pipeline_id: str, owner: str | None) -> PipelineDetail:
        """Cancel every job of a pipeline that waits or runs, in one transaction. You can repeat the request.

        Raises:
            NotFound: The owner has no such pipeline.
            Conflict: It has ended, and was not cancelled.
        """
        with self._writing.begin() as connection:
            row = group_rows.find(connection, pipelines_table, pipeline_id, owner, "pipeline")
            jobs = group_rows.jobs_of(connection, _J.pipeline, pipeline_id, lock=True)
            lost = part_rows.lost(connection, [pipeline_id]).get(pipeline_id, ())
            state = PipelineState(as_pipeline(row), group_rows.counted(jobs), lost).state
            group_rows.must_be_cancellable("pipeline", pipeline_id, state)
            group_rows.cancel(connection, pipelines_table, row, jobs, now(), CANCELLED_WAITING)
            if not state.ended:
                pipeline_ends.tell(connection, pipeline_id, jobs[-1].id)
        return self.get(pipeline_id, owner)

    def resume(self, pipeline_id: str, owner: str | None, owner_limits: LimitsConfig) -> Jobs:
        """Put every job of a pipeline that failed or was cancelled back into the queue, in one transaction.

        Raises:
            OverLimit: The jobs would exceed a limit of their owner.
            NotFound: The owner has no such pipeline.
            Conflict: None of its jobs failed or was cancelled; or one was deleted before it had completed; or one
                waits for a job outside the pipeline that will not complete.
        """
        with self._writing.begin() as connection:
            turn = queue.next_turn(connection)
            row = group_rows.find(connection, pipelines_table, pipeline_id, owner, "pipeline")
            rows = group_rows.jobs_of(connection, _J.pipeline, pipeline_id, lock=True)
            if lost := part_rows.lost(connection, [pipeline_id]).get(pipeline_id):
                raise Conflict(
                    f"pipeline {pipeline_id!r} can't be resumed: the job of part {', '.join(map(repr, lost))} was "
                    "deleted before it had completed; submit the pipeline again, or resume single jobs"
                )
            ended = [job for job in rows if JobState(job.state) in _RESUMED_FROM]
            if not ended:
                raise Conflict(f"pipeline {pipeline_id!r} has no part that failed or was cancelled; there is nothing "
                               "to resume")  # fmt: skip
            limits.must_have_left(connection, row.owner, owner_limits, len(ended))
            revived = [job.id for job in ended]
            for job in ended:
                wait_rows.must_not_be_broken(connection, job.id, revived)
            jobs = []
            for job in ended:
                jobs.append(transitions.resume(connection, job, turn))
                turn = queue.next_turn(connection)
            mine = update(pipelines_table).where(_L.turn == row.turn)
            connection.execute(mine.values(cancel_requested_at=None))
            return jobs
