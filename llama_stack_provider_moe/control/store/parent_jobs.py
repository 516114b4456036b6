"""Jobs that depend on other jobs: exports of a job, and jobs that need another job's files.

These are parts of the store's transactions. A job is inserted while the rows of the jobs that it depends on are locked.
A job is deleted while its own row and then those of its exports are locked. So no export stays without its parent, no
export is deleted while it waits or runs, and no files are deleted while another job needs them, unless that is forced.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, or_, select

from llama_stack_provider_moe.control.store import labels, part_rows, trial_rows, wait_rows
from llama_stack_provider_moe.control.store.job_row import Job, as_job, find
from llama_stack_provider_moe.control.store.schema import (
    TableRow,
    jobs_table,
    labels_table,
    uses_table,
    webhooks_table,
)
from llama_stack_provider_moe.control.store.wait_rows import Wait
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import JobState

_SHOWN = 10  # how many dependents an error names


class NewJob(NamedTuple):
    """A job to be inserted.

    Attributes:
        id: Unique among the jobs of all owners.
        owner: The only user who will see it.
        recipe: The kind of job, for lists.
        model: The model, for lists.
        folder: Absolute path of its folder.
        gpus: Requested devices; None: one if the machine that runs it has any, else the CPU.
        parent: The completed job that it exports, of the same owner.
        executor: Where it runs; None: on the supervisor's machine. Elsewhere it uses none of this machine's devices.
        uses: Ids of jobs whose files it needs for as long as it exists.
        uses_to_complete: Ids of jobs whose files it needs until it has completed.
        labels: Its labels, by key.
        note: Its owner's note.
        sweep: The sweep that it belongs to.
        notify: JSON of the `notify` block of its specification.
        pipeline: The pipeline that it belongs to.
        waits: Jobs that must complete before it starts.
    """

    id: str
    owner: str
    recipe: str
    model: str
    folder: str
    gpus: int | None = None
    parent: str | None = None
    executor: str | None = None
    uses: tuple[str, ...] = ()
    uses_to_complete: tuple[str, ...] = ()
    labels: Mapping[str, str] = MappingProxyType({})
    note: str | None = None
    sweep: str | None = None
    notify: str | None = None
    pipeline: str | None = None
    waits: tuple[Wait, ...] = ()


def insert_job(connection: Connection, new: NewJob, turn: int) -> Job:
    """Insert a job as `scheduled`.

    Raises:
        IntegrityError: The id is taken.
        NotFound: The parent does not exist, or a job that it needs was deleted.
        Conflict: The parent has not completed, or a job that it waits for will not complete.
    """
    parent: TableRow | None = None
    if new.parent is not None:
        parent = find(connection, new.parent, lock=True)
        if parent.state != JobState.COMPLETED.value:
            raise Conflict(f"job {new.parent!r} is {parent.state}; only completed jobs can be exported")
    uses = dict.fromkeys((*new.uses_to_complete, *(wait.used for wait in new.waits)), True)
    uses |= dict.fromkeys(new.uses, False)
    found: dict[str, TableRow] = {}
    for used in sorted(uses):
        try:
            found[used] = find(connection, used, lock=True)
        except NotFound:
            raise NotFound(f"job {used!r}, whose files this job needs, no longer exists") from None
    wait_rows.must_be_possible([found[wait.used] for wait in new.waits])
    moment = now()
    values = new._asdict()
    del values["uses"], values["uses_to_complete"], values["labels"], values["waits"]
    if parent is not None:
        values["pipeline"] = parent.pipeline
    values |= {
        "state": JobState.SCHEDULED.value, "scheduled_at": moment, "queued_at": moment, "turn": turn,
    }  # fmt: skip
    connection.execute(insert(jobs_table).values(values))
    if uses:
        rows = [{"job": new.id, "used": used, "until_completed": until} for used, until in uses.items()]
        connection.execute(insert(uses_table), rows)
    wait_rows.add(connection, new.id, new.waits, found)
    if parent is not None:
        wait_rows.pass_on(connection, parent, [find(connection, new.id)])
    labels.set_first(connection, new.id, new.labels)
    return as_job(find(connection, new.id))


def exports_of(connection: Connection, job_id: str, lock: bool = False) -> list[TableRow]:
    """Return the rows of a job's exports, newest first; with `lock`, lock them for this transaction."""
    query = select(jobs_table).where(jobs_table.c.parent == job_id).order_by(jobs_table.c.seq.desc())
    return list(connection.execute(query.with_for_update() if lock else query))


def dependents_of(connection: Connection, job_ids: Sequence[str]) -> list[Job]:
    """Return other jobs that need files of these jobs, oldest first."""
    needs = exists().where(
        uses_table.c.job == jobs_table.c.id, uses_table.c.used.in_(job_ids), _still_needs(jobs_table.c.state)
    )
    query = select(jobs_table).where(needs, jobs_table.c.id.not_in(job_ids)).order_by(jobs_table.c.seq)
    return [as_job(row) for row in connection.execute(query)]


def _still_needs(state: ColumnElement[str]) -> ColumnElement[bool]:
    """Condition on a row of `uses_table`: a job in this state still needs the files."""
    return or_(uses_table.c.until_completed.is_(False), state != JobState.COMPLETED.value)


def delete_family(
    connection: Connection,
    job_id: str,
    owner: str | None,
    first: Callable[[Job], None] | None,
    force: Callable[[list[Job]], None] | None,
) -> list[Job]:
    """Delete a job and its exports, which must all have ended.

    Args:
        connection: A connection inside a transaction.
        job_id: Id of the job.
        owner: Owner of the job; None for any owner.
        first: Called with each of them before the rows are deleted, with the job last.
        force: Delete them even if other jobs need their files; called with those jobs.

    Returns:
        The job as it was, then its exports.

    Raises:
        NotFound: The owner has no such job.
        Conflict: The job or one of its exports waits or runs; or other jobs need their files, and `force` is None.
    """
    row = find(connection, job_id, owner, lock=True)
    if not JobState(row.state).ended:
        raise Conflict(f"job {job_id!r} is {row.state}; cancel it before you delete it")
    exports = exports_of(connection, job_id, lock=True)
    for export in exports:
        if not JobState(export.state).ended:
            raise Conflict(
                f"job {job_id!r} is being exported: job {export.id!r} is {export.state}; cancel that one before you "
                "delete this one"
            )
    family = [as_job(each) for each in (row, *exports)]
    ids = [each.id for each in family]
    dependents = dependents_of(connection, ids)
    if force is not None:
        force(dependents)
    elif dependents:
        raise Conflict(
            f"job {job_id!r} is needed by {named(dependents, row.owner)}; delete those first, or force its deletion, "
            "which takes away files that they need"
        )
    if first is not None:
        for job in reversed(family):
            first(job)
    connection.execute(delete(uses_table).where(or_(uses_table.c.job.in_(ids), uses_table.c.used.in_(ids))))
    for table in (labels_table, webhooks_table):
        connection.execute(delete(table).where(table.c.job.in_(ids)))
    trial_rows.forget(connection, ids)
    part_rows.forget(connection, ids)
    wait_rows.forget(connection, ids)
    connection.execute(delete(jobs_table).where(jobs_table.c.id.in_(ids)))
    return family


def named(dependents: Sequence[Job], owner: str) -> str:
    """Describe jobs for the user: those of `owner` by id, those of other owners as a number."""
    own = [f"job {job.id!r} ({job.state.value})" for job in dependents if job.owner == owner]
    others = len(dependents) - len(own)
    shown = own[:_SHOWN] + ([f"{len(own) - _SHOWN} more"] if len(own) > _SHOWN else [])
    return ", ".join([*shown, *([f"{others} job(s) of other owners"] if others else [])])


def has_no_younger_export(moment: datetime) -> ColumnElement[bool]:
    """Condition on `jobs_table`: no export of the job waits, runs, or ended at or after `moment`."""
    export = jobs_table.alias()
    young = or_(export.c.ended_at.is_(None), export.c.ended_at >= moment)
    return ~exists().where(export.c.parent == jobs_table.c.id, young)


def is_needed() -> ColumnElement[bool]:
    """Condition on `jobs_table`: a job outside the family needs files of the job or of one of its exports."""
    family, needs = jobs_table.alias(), jobs_table.alias()
    in_family = or_(family.c.id == jobs_table.c.id, family.c.parent == jobs_table.c.id)
    outside = and_(needs.c.id != jobs_table.c.id, needs.c.parent.is_distinct_from(jobs_table.c.id))
    return exists().where(
        in_family,
        uses_table.c.used == family.c.id,
        needs.c.id == uses_table.c.job,
        outside,
        _still_needs(needs.c.state),
    )
