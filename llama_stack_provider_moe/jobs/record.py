"""`Job`: one row of the store's table of jobs, and how it is read and changed inside a transaction."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Select, select, update

from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.schema import jobs_table
from llama_stack_provider_moe.jobs.state import JobState

ARTIFACTS: TypeAdapter[tuple[Artifact, ...]] = TypeAdapter(tuple[Artifact, ...])


@dataclass(frozen=True)
class Job:
    """A job as the store knows it; what it is asked to do stands in its folder."""

    id: str
    owner: str
    recipe: str
    model: str
    state: JobState
    scheduled_at: datetime  # when it was submitted
    queued_at: datetime  # when it became `scheduled` for the last time: submitted, resumed, or to be tried again
    started_at: datetime | None  # when it was claimed for the last time
    ended_at: datetime | None
    cancel_requested_at: datetime | None
    attempts: int  # times it was claimed
    lost: int  # times its process was lost since it was submitted or last resumed
    reason: str | None  # why it ended so, or why it is tried again
    stopped_by: str | None  # what made a completed job stop before its last step
    artifacts: tuple[Artifact, ...]
    gpus: int | None  # devices it asks for; None: one where the machine has any, else the CPU
    devices: str | None  # what it was given, as CUDA_VISIBLE_DEVICES; "": none; None: nothing was decided for it
    supervisor: str | None  # the one that claimed it
    pid: int | None  # of the training process, which leads its own session and process group
    pid_birth: float | None  # see `processes.birth`
    folder: str  # absolute
    parent: str | None  # id of the job that it exports
    executor: str | None  # where it runs; None: on the supervisor's machine
    run: str | None  # its name on a cluster, where it has neither pid nor pid_birth


def find(connection: Connection, job_id: str, owner: str | None = None, lock: bool = False) -> Row[Any]:
    """The row of a job, locked for this transaction with `lock`; `NotFound`, also when it is another owner's."""
    query: Select[Any] = select(jobs_table).where(jobs_table.c.id == job_id)
    if owner is not None:
        query = query.where(jobs_table.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"job {job_id!r} does not exist")
    return row


def change(connection: Connection, row: Row[Any], changes: dict[str, Any]) -> Job:
    """Write `changes` into the row; the job as it is then."""
    connection.execute(update(jobs_table).where(jobs_table.c.seq == row.seq).values(**changes))
    return as_job(find(connection, row.id))


def as_job(row: Row[Any]) -> Job:
    """A row as the rest of the package sees it."""
    values = row._asdict()
    del values["seq"], values["turn"]
    values["state"] = JobState(row.state)
    values["artifacts"] = ARTIFACTS.validate_json(row.artifacts)
    return Job(**values)
