"""Labels and notes of jobs: parts of the store's transactions."""

from collections.abc import Iterable, Mapping
from itertools import batched
from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select

from llama_stack_provider_moe.control.store.job_row import Job, change, find
from llama_stack_provider_moe.control.store.schema import labels_table
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.labels import MAX_LABELS

_AT_A_TIME = 500  # ids in one query: databases limit its parameters
_L = labels_table.c


class LabelledJob(NamedTuple):
    """A job and its labels, by key."""

    job: Job
    labels: dict[str, str]


class LabelChange(NamedTuple):
    """What an owner changes about a job.

    Attributes:
        labels: New values by key; None removes a label. Other labels stay.
        note: The new note, None for none; only if `sets_note`.
        sets_note: Whether the note changes.
    """

    labels: Mapping[str, str | None]
    note: str | None = None
    sets_note: bool = False


def of(connection: Connection, job_ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the labels of jobs, by job and key; jobs without labels are left out."""
    found: dict[str, dict[str, str]] = {}
    for some in batched(job_ids, _AT_A_TIME):
        query = select(_L.job, _L.key, _L.value).where(_L.job.in_(some)).order_by(_L.key)
        for job_id, key, value in connection.execute(query):
            found.setdefault(job_id, {})[key] = value
    return found


def set_first(connection: Connection, job_id: str, labels: Mapping[str, str]) -> None:
    """Write the labels of a new job."""
    if labels:
        rows = [{"job": job_id, "key": key, "value": value} for key, value in labels.items()]
        connection.execute(insert(labels_table), rows)


def apply(connection: Connection, job_id: str, owner: str | None, asked: LabelChange) -> LabelledJob:
    """Change the labels and the note of a job in any state.

    Args:
        connection: A connection inside a transaction.
        job_id: Id of the job.
        owner: Owner of the job; None for any owner.
        asked: The change.

    Raises:
        NotFound: The owner has no such job.
        InvalidInput: The job would have too many labels.
    """
    row = find(connection, job_id, owner, lock=True)
    kept = {key: value for key, value in of(connection, [job_id]).get(job_id, {}).items() if key not in asked.labels}
    new = {key: value for key, value in asked.labels.items() if value is not None}
    if len(kept) + len(new) > MAX_LABELS:
        raise InvalidInput("labels", [*kept, *new], f"at most {MAX_LABELS} labels of a job")
    connection.execute(delete(labels_table).where(_L.job == job_id, _L.key.in_(list(asked.labels))))
    set_first(connection, job_id, new)
    job = change(connection, row, {"note": asked.note if asked.sets_note else row.note})
    return LabelledJob(job, dict(sorted((kept | new).items())))
