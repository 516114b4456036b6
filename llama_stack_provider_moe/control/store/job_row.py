"""`Job`: one row of the store's jobs table, and functions that read and change it inside a transaction."""

import json
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from sqlalchemy import Column, Connection, select, update

from llama_stack_provider_moe.control.store.owners import belongs_to
from llama_stack_provider_moe.control.store.schema import UNREADABLE_TIME, TableRow, jobs_table
from llama_stack_provider_moe.errors import NotFound, shorten
from llama_stack_provider_moe.jobdir.attempt import attempt_name
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.reading import read_each, why_unreadable
from llama_stack_provider_moe.jobdir.state import JobState

ARTIFACTS: TypeAdapter[tuple[Artifact, ...]] = TypeAdapter(tuple[Artifact, ...], config=ConfigDict(defer_build=True))


@dataclass(frozen=True)
class Job:
    """A job as the store knows it. Its folder holds the specification."""

    id: str
    owner: str
    recipe: str
    model: str
    state: JobState
    scheduled_at: datetime  # when it was submitted
    queued_at: datetime  # when it last became `scheduled`: submitted, resumed, or put back for another try
    started_at: datetime | None  # when it was last claimed
    ended_at: datetime | None
    cancel_requested_at: datetime | None
    attempts: int  # how often it was claimed
    lost: int  # how often its process was lost since it was submitted or last resumed
    reason: str | None  # why it ended, or why it is tried again
    stopped_by: str | None  # what stopped a completed job before its last step
    artifacts: tuple[Artifact, ...]
    gpus: int | None  # requested devices; None: one if the machine has any, else the CPU
    devices: str | None  # assigned devices, as CUDA_VISIBLE_DEVICES; "": none; None: not decided
    supervisor: str | None  # the supervisor that claimed it
    pid: int | None  # of the training process, which leads its own session and process group
    pid_birth: float | None  # see `processes.birth`
    folder: str  # absolute path
    parent: str | None  # id of the job that it exports
    executor: str | None  # where it runs; None: on the supervisor's machine
    run: str | None  # its name on a cluster; then pid and pid_birth are None
    note: str | None  # its owner's words about it
    sweep: str | None  # id of the sweep that it belongs to
    pipeline: str | None  # id of the pipeline that it belongs to
    notify: str | None  # JSON of the `notify` block of its specification
    unreadable: str | None = None  # which parts of the row can't be read, and why; None: all can be read

    @property
    def attempt(self) -> str:
        """Name of its current start, see `jobdir.attempt`."""
        return attempt_name(self.attempts, self.started_at)


def find(connection: Connection, job_id: str, owner: str | None = None, lock: bool = False) -> TableRow:
    """Return the row of a job.

    Args:
        connection: A connection inside a transaction.
        job_id: Id of the job.
        owner: Owner of the job; None for any owner.
        lock: Lock the row for this transaction.

    Raises:
        NotFound: The job does not exist, or belongs to another owner.
    """
    query = select(jobs_table).where(jobs_table.c.id == job_id)
    if owner is not None:
        query = query.where(belongs_to(owner))
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"job {job_id!r} does not exist")
    return row


def change(connection: Connection, row: TableRow, changes: dict[str, object]) -> Job:
    """Write `changes` to the row and return the changed job."""
    connection.execute(update(jobs_table).where(jobs_table.c.seq == row.seq).values(**changes))
    return as_job(find(connection, row.id))


def as_job(row: TableRow) -> Job:
    """Return a row as a `Job`.

    A row that is damaged, or that another version wrote, also becomes a job, so that lists still work. Values that
    can't be read are left out, and `unreadable` names them.
    """
    values: dict[str, Any] = {}
    problems = []
    for column in _COLUMNS:
        value = getattr(row, column.name)
        if _can_be_read(column, value):
            values[column.name] = value
        else:
            values[column.name] = None if column.nullable else _placeholder(column, value)
            shown = "the time" if value == UNREADABLE_TIME else shorten(value)
            problems.append(f"{column.name}: {shown} can't be read")
    state = JobState(row.state)
    if state is JobState.UNREADABLE:
        problems.append(f"state: {shorten(row.state)} is not known to this version of llama-stack-provider-moe")
    artifacts, damage = _artifacts(row.artifacts)
    problems += [f"artifacts: {why}" for why in damage]
    return Job(**values, state=state, artifacts=artifacts, unreadable="; ".join(problems) or None)


_READ_APART = {"state", "artifacts", "unreadable"}
_COLUMNS: list[Column[object]] = [jobs_table.c[field.name] for field in fields(Job) if field.name not in _READ_APART]


def _can_be_read(column: Column[object], value: object) -> bool:
    """SQLite stores any value, whatever the column's type."""
    if value is None:
        return bool(column.nullable)
    kind = column.type.python_type
    return isinstance(value, (int, float) if kind is float else kind) and value != UNREADABLE_TIME


def _placeholder(column: Column[object], value: object) -> object:
    kind = column.type.python_type
    return UNREADABLE_TIME if kind is datetime else 0 if kind is int else str(value)


def _artifacts(text: str) -> tuple[tuple[Artifact, ...], list[str]]:
    try:
        values = json.loads(text)  # a damaged row may hold another type: TypeError
    except (ValueError, TypeError, RecursionError) as error:
        return (), [why_unreadable(error)]
    found, problems = read_each(Artifact, values)
    return tuple(found), problems
