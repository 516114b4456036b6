"""`JobStore`: the one place where a job's state is kept, and the lease of the supervisor that runs jobs.

Every method is one transaction. Reads are cheap; writes of two processes are serialised by the database, so a job is
claimed once and a move is checked against the state it really leaves.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.schema import jobs_table, open_engine, supervisor_table
from llama_stack_provider_moe.jobs.state import JobState, check_move

CANCELLED_WAITING = "cancelled before it began"
_ARTIFACTS: TypeAdapter[tuple[Artifact, ...]] = TypeAdapter(tuple[Artifact, ...])


@dataclass(frozen=True)
class Job:
    """A job as the store knows it; what it is asked to do stands in its folder."""

    id: str
    owner: str
    recipe: str
    model: str
    state: JobState
    scheduled_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    cancel_requested_at: datetime | None
    attempts: int  # times it was claimed
    reason: str | None
    artifacts: tuple[Artifact, ...]
    supervisor: str | None  # the one that claimed it
    pid: int | None  # of the training process, which leads its own session and process group
    pid_birth: float | None  # see `processes.birth`
    folder: str  # absolute


Jobs = list[Job]  # `JobStore.list` hides the built-in inside that class


@dataclass(frozen=True)
class LiveSupervisor:
    """The holder of an unexpired lease."""

    id: str
    pid: int
    beat_at: datetime


class JobStore:
    """Jobs and the supervisor's lease, in SQLite or PostgreSQL; safe to share between threads.

    Args:
        url: SQLAlchemy URL. SQLite must be a file on a local disk (WAL needs shared memory).
    """

    def __init__(self, url: str) -> None:
        self._reading = open_engine(url)
        self._writing = self._reading.execution_options(writes=True)

    def close(self) -> None:
        """Close every connection; the store can't be used afterwards by other threads either."""
        self._reading.dispose()

    def check(self) -> None:
        """Raise unless the store answers."""
        with self._reading.begin() as connection:
            connection.execute(select(supervisor_table.c.id)).one()

    def answers(self) -> bool:
        """False where the database can't be reached or read; `check` says why."""
        try:
            self.check()
        except SQLAlchemyError:
            return False
        return True

    # Jobs, as their owners see them. `owner=None` stands for any owner: the supervisor, an administrator.

    def submit(self, job_id: str, owner: str, recipe: str, model: str, folder: str) -> Job:
        """Insert a job as `scheduled`.

        Raises:
            Conflict: the id is taken, by whomever.
        """
        values = {"id": job_id, "owner": owner, "recipe": recipe, "model": model, "folder": folder}
        try:
            with self._writing.begin() as connection:
                # PostgreSQL: waits for a supervisor that is just leaving, see `release_lease`.
                connection.execute(select(supervisor_table.c.id).with_for_update(read=True))
                connection.execute(
                    insert(jobs_table).values(state=JobState.SCHEDULED.value, scheduled_at=now(), **values)
                )
                return _one(connection, job_id)
        except IntegrityError:
            raise Conflict(f"job {job_id!r} exists already; leave out job_uuid or choose another") from None

    def get(self, job_id: str, owner: str | None) -> Job:
        """The job, or `NotFound`, also when it is another owner's."""
        with self._reading.begin() as connection:
            return _one(connection, job_id, owner)

    def list(self, owner: str | None, limit: int = 1000, after: str | None = None) -> Jobs:
        """At most `limit` jobs, newest first; `after`: id of the last one of the page before (else `NotFound`)."""
        query = select(jobs_table).order_by(jobs_table.c.seq.desc()).limit(limit)
        if owner is not None:
            query = query.where(jobs_table.c.owner == owner)
        with self._reading.begin() as connection:
            if after is not None:
                query = query.where(jobs_table.c.seq < _row(connection, after, owner).seq)
            return [_job(row) for row in connection.execute(query)]

    def request_cancel(self, job_id: str, owner: str | None) -> Job:
        """Ask for a job to be cancelled, any number of times.

        A scheduled job is `cancelled` at once; one in progress is marked, and the supervisor stops it.

        Raises:
            NotFound: no such job of this owner.
            Conflict: it has completed or failed.
        """
        with self._writing.begin() as connection:
            row = _row(connection, job_id, owner, lock=True)
            state = JobState(row.state)
            if state is JobState.CANCELLED or (state is JobState.IN_PROGRESS and row.cancel_requested_at):
                return _job(row)
            check_move(job_id, state, JobState.CANCELLED)
            moment = now()
            changes: dict[str, Any] = {"cancel_requested_at": moment}
            if state is JobState.SCHEDULED:
                changes |= {
                    "state": JobState.CANCELLED.value,
                    "ended_at": moment,
                    "reason": CANCELLED_WAITING,
                }
            return _change(connection, row, changes)

    def queue_position(self, job_id: str) -> int:
        """1 for the job that is claimed next, 2 for the one after it; 0 for a job that does not wait."""
        with self._reading.begin() as connection:
            row = _row(connection, job_id)
            waiting = select(func.count()).where(
                jobs_table.c.state == JobState.SCHEDULED.value, jobs_table.c.seq <= row.seq
            )
            return connection.execute(waiting).scalar_one() if row.state == JobState.SCHEDULED.value else 0

    def counts(self) -> dict[JobState, int]:
        """How many jobs, of all owners, are in each state."""
        query = select(jobs_table.c.state, func.count().label("jobs")).group_by(jobs_table.c.state)
        with self._reading.begin() as connection:
            found = {row.state: row.jobs for row in connection.execute(query)}
        return {state: found.get(state.value, 0) for state in JobState}

    # Jobs, as the supervisor moves them.

    def claim(self, supervisor_id: str) -> Job | None:
        """Take the oldest scheduled job: `in_progress`, one attempt more, no process yet. None: nothing waits."""
        oldest = (
            select(jobs_table).where(jobs_table.c.state == JobState.SCHEDULED.value).order_by(jobs_table.c.seq).limit(1)
        )
        with self._reading.begin() as connection:  # most looks find nothing, and then need no write lock
            if connection.execute(oldest).first() is None:
                return None
        with self._writing.begin() as connection:
            row = connection.execute(oldest.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            return _change(connection, row, {
                "state": JobState.IN_PROGRESS.value, "started_at": now(), "attempts": row.attempts + 1,
                "supervisor": supervisor_id, "pid": None, "pid_birth": None,
            })  # fmt: skip

    def launched(self, job_id: str, pid: int, pid_birth: float) -> Job:
        """Record the process of a job in progress; the first to record one wins.

        Raises:
            Conflict: the job is not in progress, or has a process already.
        """
        with self._writing.begin() as connection:
            row = _row(connection, job_id, lock=True)
            if row.state != JobState.IN_PROGRESS.value or row.pid is not None:
                raise Conflict(f"job {job_id!r} is {row.state} with process {row.pid}; it can't get process {pid}")
            return _change(connection, row, {"pid": pid, "pid_birth": pid_birth})

    def move(
        self,
        job_id: str,
        new_state: JobState,
        reason: str | None = None,
        artifacts: tuple[Artifact, ...] = (),
    ) -> Job:
        """Move a job to `new_state`, with what it left.

        Raises:
            Conflict: no such move from the state it is in.
        """
        with self._writing.begin() as connection:
            row = _row(connection, job_id, lock=True)
            check_move(job_id, JobState(row.state), new_state)
            return _change(connection, row, {
                "state": new_state.value, "reason": reason, "artifacts": _ARTIFACTS.dump_json(artifacts).decode(),
                "ended_at": now() if new_state.ended else None,
            })  # fmt: skip

    def running(self) -> Jobs:
        """Every job in progress, oldest first, whoever claimed it."""
        query = select(jobs_table).where(jobs_table.c.state == JobState.IN_PROGRESS.value).order_by(jobs_table.c.seq)
        with self._reading.begin() as connection:
            return [_job(row) for row in connection.execute(query)]

    # The supervisor's lease.

    def acquire_lease(self, supervisor_id: str, pid: int, lease_s: float) -> bool:
        """Become the store's supervisor for `lease_s` seconds; False while another one is."""
        with self._writing.begin() as connection:
            row = connection.execute(select(supervisor_table).with_for_update()).one()
            if _is_live(row) and row.holder != supervisor_id:
                return False
            connection.execute(
                update(supervisor_table).values(holder=supervisor_id, pid=pid, beat_at=now(), lease_s=lease_s)
            )
            return True

    def beat(self, supervisor_id: str, lease_s: float) -> bool:
        """Renew the lease; False when another supervisor has taken it."""
        with self._writing.begin() as connection:
            renewed = connection.execute(
                update(supervisor_table)
                .where(supervisor_table.c.holder == supervisor_id)
                .values(beat_at=now(), lease_s=lease_s)
            )
            return renewed.rowcount == 1

    def release_lease(self, supervisor_id: str, only_if_idle: bool) -> bool:
        """Give the lease up; False when it is not held, or (with `only_if_idle`) a job waits or runs.

        No job is stranded between a supervisor that leaves and a server that submits and then looks for a live
        supervisor: one of the two transactions comes first. If it is the submission, the job is counted here and
        the supervisor stays; else the server finds the lease free.
        """
        unfinished = (JobState.SCHEDULED.value, JobState.IN_PROGRESS.value)
        with self._writing.begin() as connection:
            row = connection.execute(select(supervisor_table).with_for_update()).one()
            if row.holder != supervisor_id:
                return False
            if (
                only_if_idle
                and connection.execute(
                    select(jobs_table.c.seq).where(jobs_table.c.state.in_(unfinished)).limit(1)
                ).first()
            ):
                return False
            connection.execute(update(supervisor_table).values(holder=None, pid=None, beat_at=None, lease_s=None))
            return True

    def live_supervisor(self) -> LiveSupervisor | None:
        """Who holds the lease, or None where it is free or has run out."""
        with self._reading.begin() as connection:
            row = connection.execute(select(supervisor_table)).one()
        return LiveSupervisor(row.holder, row.pid, row.beat_at) if _is_live(row) else None


def _row(connection: Connection, job_id: str, owner: str | None = None, lock: bool = False) -> Row[Any]:
    query: Select[Any] = select(jobs_table).where(jobs_table.c.id == job_id)
    if owner is not None:
        query = query.where(jobs_table.c.owner == owner)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound(f"job {job_id!r} does not exist")
    return row


def _one(connection: Connection, job_id: str, owner: str | None = None) -> Job:
    return _job(_row(connection, job_id, owner))


def _change(connection: Connection, row: Row[Any], changes: dict[str, Any]) -> Job:
    connection.execute(update(jobs_table).where(jobs_table.c.seq == row.seq).values(**changes))
    return _one(connection, row.id)


def _job(row: Row[Any]) -> Job:
    values = row._asdict()
    del values["seq"]
    values["state"] = JobState(row.state)
    values["artifacts"] = _ARTIFACTS.validate_json(row.artifacts)
    return Job(**values)


def _is_live(row: Row[Any]) -> bool:
    if row.holder is None:
        return False
    # Both ways: a clock that was set back must not keep a dead supervisor's lease alive for hours.
    age_s: float = (now() - row.beat_at).total_seconds()
    return abs(age_s) < float(row.lease_s)
