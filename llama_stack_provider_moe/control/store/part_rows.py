"""The rows of jobs that are parts of pipelines (`parts`): parts of the store's transactions.

A part whose job was deleted before it had completed keeps its row as long as the pipeline has any job, so that the
pipeline is not taken for complete without it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, and_, delete, exists, select

from llama_stack_provider_moe.control.store.schema import jobs_table, parts_table, pipelines_table
from llama_stack_provider_moe.jobdir.state import JobState

_J, _P, _L = jobs_table.c, parts_table.c, pipelines_table.c


class Part(NamedTuple):
    """A job of a pipeline, as the pipeline sees it."""

    job: str
    number: int
    name: str


def of_pipeline(connection: Connection, pipeline_id: str) -> list[Part]:
    """Return the parts of a pipeline, in their order."""
    query = select(_P.job, _P.number, _P.name).where(_P.pipeline == pipeline_id).order_by(_P.number)
    return [Part(*row) for row in connection.execute(query)]


def lost(connection: Connection, pipeline_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of parts whose jobs were deleted before they had completed, by the pipeline."""
    has_job = exists().where(_J.id == _P.job, _J.pipeline == _P.pipeline)
    query = select(_P.pipeline, _P.name).where(_P.pipeline.in_(pipeline_ids), ~has_job).order_by(_P.number)
    found: dict[str, list[str]] = {}
    for pipeline, name in connection.execute(query) if pipeline_ids else ():
        found.setdefault(pipeline, []).append(name)
    return found


def forget(connection: Connection, job_ids: Sequence[str]) -> None:
    """Delete what the store knows of jobs as parts before they are deleted, and pipelines of which no job is left."""
    of_these = select(_J.pipeline).where(_J.id.in_(job_ids), _J.pipeline.is_not(None)).distinct()
    pipelines = list(connection.execute(of_these).scalars())
    if not pipelines:
        return
    completed = and_(_J.id == _P.job, _J.pipeline == _P.pipeline, _J.state == JobState.COMPLETED.value)
    connection.execute(delete(parts_table).where(_P.job.in_(job_ids), exists().where(completed)))
    left = set(connection.execute(
        select(_J.pipeline).where(_J.pipeline.in_(pipelines), _J.id.not_in(job_ids)).distinct()
    ).scalars())  # fmt: skip
    gone = [pipeline for pipeline in pipelines if pipeline not in left]
    connection.execute(delete(parts_table).where(_P.pipeline.in_(gone)))
    connection.execute(delete(pipelines_table).where(_L.id.in_(gone)))
