"""The rows of jobs that are parts of pipelines (`parts`): parts of the store's transactions."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, delete, exists, select

from llama_stack_provider_moe.control.store.schema import parts_table, pipelines_table

_P, _L = parts_table.c, pipelines_table.c


class Part(NamedTuple):
    """A job of a pipeline, as the pipeline sees it."""

    job: str
    number: int
    name: str


def of_pipeline(connection: Connection, pipeline_id: str) -> list[Part]:
    """Return the parts of a pipeline, in their order."""
    query = select(_P.job, _P.number, _P.name).where(_P.pipeline == pipeline_id).order_by(_P.number)
    return [Part(*row) for row in connection.execute(query)]


def forget(connection: Connection, job_ids: Sequence[str]) -> None:
    """Delete what the store knows of deleted jobs as parts, and pipelines that have no part any more."""
    of_these = select(_P.pipeline).where(_P.job.in_(job_ids)).distinct()
    pipelines = list(connection.execute(of_these).scalars())
    if pipelines:
        connection.execute(delete(parts_table).where(_P.job.in_(job_ids)))
        left = exists().where(_P.pipeline == _L.id)
        connection.execute(delete(pipelines_table).where(_L.id.in_(pipelines), ~left))
