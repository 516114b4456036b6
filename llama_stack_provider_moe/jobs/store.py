"""`JobStore`: the one place where a job's state is kept, and the lease of the supervisor that runs jobs.

Every method is one transaction. Reads are cheap; writes of two processes are serialised by the database, so a job is
claimed once and a move is checked against the state it really leaves.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection, func, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobs import lineage, queue
from llama_stack_provider_moe.jobs.census import Census, taken
from llama_stack_provider_moe.jobs.events import now
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.lease import LiveSupervisor, holder
from llama_stack_provider_moe.jobs.lineage import NewJob
from llama_stack_provider_moe.jobs.record import ARTIFACTS, Job, as_job, change, find
from llama_stack_provider_moe.jobs.schema import for_reading, jobs_table, open_engine, supervisor_table
from llama_stack_provider_moe.jobs.state import ENDED, JobState, check_move

__all__ = ["CANCELLED_WAITING", "Job", "JobStore", "Jobs", "LiveSupervisor", "NewJob"]

CANCELLED_WAITING = "cancelled before it began"
_CANCELLED_AGAIN = "cancelled while it waited to go on"

Jobs = list[Job]  # `JobStore.list` hides the built-in inside that class
# A job that goes back into the queue. Its artifacts stay: what it saved is still there if it is cancelled now.
_WAITS: dict[str, Any] = {
    "state": JobState.SCHEDULED.value, "ended_at": None, "cancel_requested_at": None, "stopped_by": None,
    "devices": None, "supervisor": None, "pid": None, "pid_birth": None, "run": None,
}  # fmt: skip


class JobStore:
    """Jobs and the supervisor's lease, in SQLite or PostgreSQL; safe to share between threads.

    Args:
        url: SQLAlchemy URL. SQLite must be a file on a local disk (WAL needs shared memory).
    """

    def __init__(self, url: str) -> None:
        engine = open_engine(url)
        self._reading = for_reading(engine)
        self._writing = engine.execution_options(writes=True)
        self._looking: PoolProxiedConnection | None = None
        self._version: int | None = None

    def close(self) -> None:
        """Close every connection; the store can't be used afterwards by other threads either."""
        if self._looking is not None:
            self._looking.close()
            self._looking = None
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

    def has_changed(self) -> bool:
        """False where nothing at all was written since the last call; for one caller, the supervisor.

        A look at a number in shared memory (sqlite.org/pragma.html#pragma_data_version), some 400 times cheaper than
        the queries that find nothing to do. PostgreSQL has no such number: always True.
        """
        if self._reading.dialect.name != "sqlite":
            return True
        if self._looking is None:
            # One of its own, which never writes and never is in a transaction: it would not see its own changes.
            self._looking = self._reading.raw_connection()
        cursor = self._looking.cursor()
        cursor.execute("PRAGMA data_version")
        ((version,),) = cursor.fetchall()
        before, self._version = self._version, version
        cursor.close()
        return before != self._version

    # Jobs, as their owners see them. `owner=None` stands for any owner: the supervisor, an administrator.

    def submit(self, job_id: str, owner: str, recipe: str, model: str, folder: str, gpus: int | None = None) -> Job:
        """Insert a job as `scheduled`, the last in its owner's queue.

        Args:
            job_id: unique among all owners' jobs.
            owner: who alone will see it.
            recipe: what kind of training, for lists.
            model: what is trained, for lists.
            folder: absolute path of its folder.
            gpus: devices it asks for; None: one where the machine that runs it has any, else the CPU.

        Raises:
            Conflict: the id is taken, by whomever.
        """
        return self.add(NewJob(job_id, owner, recipe, model, folder, gpus))

    def add(self, new: NewJob) -> Job:
        """The same, of any kind of job; also `NotFound` or `Conflict`: its parent is not there, or not completed."""
        try:
            with self._writing.begin() as connection:
                return lineage.insert_job(connection, new, _next_turn(connection))
        except IntegrityError:
            raise Conflict(f"job {new.id!r} exists already; leave out job_uuid or choose another") from None

    def exports(self, job_id: str) -> Jobs:
        """A job's exports, newest first."""
        with self._reading.begin() as connection:
            return [as_job(row) for row in lineage.exports_of(connection, job_id)]

    def get(self, job_id: str, owner: str | None) -> Job:
        """The job, or `NotFound`, also when it is another owner's."""
        with self._reading.begin() as connection:
            return as_job(find(connection, job_id, owner))

    def list(self, owner: str | None, limit: int = 1000, after: str | None = None) -> Jobs:
        """At most `limit` jobs, newest first; `after`: id of the last one of the page before (else `NotFound`)."""
        query = select(jobs_table).order_by(jobs_table.c.seq.desc()).limit(limit)
        if owner is not None:
            query = query.where(jobs_table.c.owner == owner)
        with self._reading.begin() as connection:
            if after is not None:
                query = query.where(jobs_table.c.seq < find(connection, after, owner).seq)
            return [as_job(row) for row in connection.execute(query)]

    def request_cancel(self, job_id: str, owner: str | None) -> Job:
        """Ask for a job to be cancelled, any number of times.

        A scheduled job is `cancelled` at once; one in progress is marked, and the supervisor stops it.

        Raises:
            NotFound: no such job of this owner.
            Conflict: it has completed or failed.
        """
        with self._writing.begin() as connection:
            row = find(connection, job_id, owner, lock=True)
            state = JobState(row.state)
            if state is JobState.CANCELLED or (state is JobState.IN_PROGRESS and row.cancel_requested_at):
                return as_job(row)
            check_move(job_id, state, JobState.CANCELLED)
            moment = now()
            changes: dict[str, Any] = {"cancel_requested_at": moment}
            if state is JobState.SCHEDULED:
                changes |= {
                    "state": JobState.CANCELLED.value,
                    "ended_at": moment,
                    "reason": _CANCELLED_AGAIN if row.attempts else CANCELLED_WAITING,
                }
            return change(connection, row, changes)

    def resume(self, job_id: str, owner: str | None) -> Job:
        """Put a cancelled or failed job back into the queue, the last of its owner's.

        Raises:
            NotFound: no such job of this owner.
            Conflict: it has completed, or waits or runs already.
        """
        with self._writing.begin() as connection:
            turn = _next_turn(connection)
            row = find(connection, job_id, owner, lock=True)
            state = JobState(row.state)
            if state is JobState.COMPLETED:
                raise Conflict(f"job {job_id!r} has completed; there is nothing left to resume")
            if not state.ended:
                raise Conflict(f"job {job_id!r} is {state.value}; only a cancelled or failed job can be resumed")
            check_move(job_id, state, JobState.SCHEDULED)
            return change(connection, row, _WAITS | {"queued_at": now(), "turn": turn, "lost": 0, "reason": None})

    def delete(self, job_id: str, owner: str | None, first: Callable[[Job], None] | None = None) -> Jobs:
        """Forget a job that has ended, and its exports; the job as it was, then those. `removal` deletes folders too.

        Args:
            job_id: which.
            owner: whose; None: anybody's.
            first: called with each of them, the job last, once none can be resumed any more; if it raises, they stay.

        Raises:
            NotFound: no such job of this owner.
            Conflict: it, or an export of it, waits or runs.
        """
        with self._writing.begin() as connection:
            return lineage.delete_family(connection, job_id, owner, first)

    def ended_before(self, moment: datetime, limit: int = 100) -> Jobs:
        """At most `limit` jobs of all owners that ended before `moment`, as did their exports; the oldest first."""
        column, old = jobs_table.c.ended_at, lineage.has_no_younger_export(moment)
        query = select(jobs_table).where(column < moment, old).order_by(column, jobs_table.c.seq).limit(limit)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query)]

    def queue_position(self, job_id: str) -> int:
        """1 for the job that is claimed next, 2 for the one after it; 0 for a job that does not wait.

        A job that needs no device may go ahead of one that waits for devices, see `queue`.
        """
        with self._reading.begin() as connection:
            row = find(connection, job_id)
            return queue.position(connection, row) if row.state == JobState.SCHEDULED.value else 0

    def counts(self) -> dict[JobState, int]:
        """How many jobs, of all owners, are in each state."""
        query = select(jobs_table.c.state, func.count().label("jobs")).group_by(jobs_table.c.state)
        with self._reading.begin() as connection:
            found = {row.state: row.jobs for row in connection.execute(query)}
        return {state: found.get(state.value, 0) for state in JobState}

    def census(self, since: datetime | None = None) -> Census:
        """All owners' jobs counted, and those that ended after `since`."""
        with self._reading.begin() as connection:
            return taken(connection, since)

    # Jobs, as the supervisor moves them.

    def claim(self, supervisor_id: str, devices: Sequence[str] | None = None) -> Job | None:
        """Take the next job that fits: `in_progress`, one attempt more, no process yet.

        None: there is none, or the next one is being cancelled this very moment; ask again at the next look.

        Args:
            supervisor_id: who takes it.
            devices: all the devices that are given out, free or not; None: nobody knows of any. No two jobs in
                progress are ever given the same one.
        """
        with self._reading.begin() as connection:  # most looks find nothing, and then need no write lock
            if queue.pick(connection, devices) == queue.NOTHING:
                return None
        with self._writing.begin() as connection:
            # Claims come one after the other on PostgreSQL too: devices and fairness are counted over several rows.
            connection.execute(select(supervisor_table.c.id).with_for_update())
            choice = queue.pick(connection, devices)
            if choice.kept is not None:
                kept = (jobs_table.c.seq == choice.kept.seq, jobs_table.c.state == JobState.SCHEDULED.value)
                connection.execute(update(jobs_table).where(*kept).values(turn=0))
            if choice.job is None:
                return None
            # Skipped where whoever cancels it holds its row: the claim must not wait for him.
            mine = (jobs_table.c.seq == choice.job.seq, jobs_table.c.state == JobState.SCHEDULED.value)
            row = connection.execute(select(jobs_table).where(*mine).with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            return change(connection, row, {
                "state": JobState.IN_PROGRESS.value, "started_at": now(), "attempts": row.attempts + 1,
                "supervisor": supervisor_id, "pid": None, "pid_birth": None, "run": None,
                "devices": choice.devices,
            })  # fmt: skip

    def asking_for_more(self, gpus: int) -> Jobs:
        """Jobs that wait for more than `gpus` devices."""
        query = select(jobs_table).where(jobs_table.c.state == JobState.SCHEDULED.value, jobs_table.c.gpus > gpus)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query.order_by(jobs_table.c.seq))]

    def launched(self, job_id: str, pid: int | None, pid_birth: float | None, run: str | None = None) -> Job:
        """Record the process of a job in progress, or its name on a cluster; the first to record one wins.

        Raises:
            Conflict: the job is not in progress, or has a process already.
        """
        with self._writing.begin() as connection:
            row = find(connection, job_id, lock=True)
            if row.state != JobState.IN_PROGRESS.value or row.pid is not None or row.run is not None:
                has, gets = row.run or row.pid, run or pid
                raise Conflict(f"job {job_id!r} is {row.state} with process {has}; it can't get process {gets}")
            return change(connection, row, {"pid": pid, "pid_birth": pid_birth, "run": run})

    def requeue(self, job_id: str, reason: str, artifacts: tuple[Artifact, ...] = ()) -> Job:
        """Put a job whose process was lost back into the queue, before all that wait; `reason` says why.

        Raises:
            Conflict: it is not in progress, or was asked to be cancelled.
        """
        with self._writing.begin() as connection:
            row = find(connection, job_id, lock=True)
            if row.state != JobState.IN_PROGRESS.value:
                raise Conflict(f"job {job_id!r} is {row.state}; only a job in progress can have lost its process")
            if row.cancel_requested_at is not None:
                raise Conflict(f"job {job_id!r} was asked to be cancelled; it is not tried again")
            return change(connection, row, _WAITS | {
                "queued_at": now(), "turn": 0, "lost": row.lost + 1, "reason": reason, "artifacts": _json(artifacts),
            })  # fmt: skip

    def move(
        self,
        job_id: str,
        new_state: JobState,
        reason: str | None = None,
        artifacts: tuple[Artifact, ...] = (),
        stopped_by: str | None = None,
        export: NewJob | None = None,
    ) -> Job:
        """Move a job to `new_state`, with what it left; back into the queue it comes by `requeue` or `resume`.

        With `export`, a job that exports what this one left is inserted; both happen, or neither does.

        Raises:
            Conflict: no such move from the state it is in; or the export's id is taken.
        """
        assert new_state is not JobState.SCHEDULED, "a job that waits needs a turn"
        try:
            with self._writing.begin() as connection:
                turn = None if export is None else _next_turn(connection)
                row = find(connection, job_id, lock=True)
                check_move(job_id, JobState(row.state), new_state)
                job = change(connection, row, {
                    "state": new_state.value, "reason": reason, "artifacts": _json(artifacts),
                    "stopped_by": stopped_by, "ended_at": now() if new_state in ENDED else None,
                })  # fmt: skip
                if export is not None and turn is not None:
                    lineage.insert_job(connection, export, turn)
                return job
        except IntegrityError:
            raise Conflict(f"job {job_id!r} could not end: its export's name was taken just now") from None

    def running(self) -> Jobs:
        """Every job in progress, oldest first, whoever claimed it."""
        query = select(jobs_table).where(jobs_table.c.state == JobState.IN_PROGRESS.value).order_by(jobs_table.c.seq)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query)]

    def has_work(self) -> bool:
        """Whether any job, of whichever owner, waits or runs."""
        with self._reading.begin() as connection:
            return _has_work(connection)

    # The supervisor's lease.

    def acquire_lease(self, supervisor_id: str, pid: int, lease_s: float) -> bool:
        """Become the store's supervisor for `lease_s` seconds; False while another one is."""
        with self._writing.begin() as connection:
            row = connection.execute(select(supervisor_table).with_for_update()).one()
            other = holder(row)
            if other is not None and other.id != supervisor_id and other.is_live(now()):
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
        with self._writing.begin() as connection:
            row = connection.execute(select(supervisor_table).with_for_update()).one()
            if row.holder != supervisor_id or (only_if_idle and _has_work(connection)):
                return False
            connection.execute(update(supervisor_table).values(holder=None, pid=None, beat_at=None, lease_s=None))
            return True

    def live_supervisor(self) -> LiveSupervisor | None:
        """Who holds the lease, or None where it is free or has run out."""
        last = self.last_supervisor()
        return last if last is not None and last.is_live(now()) else None

    def last_supervisor(self) -> LiveSupervisor | None:
        """Who holds the lease, also where it has run out; None where it is free."""
        with self._reading.begin() as connection:
            return holder(connection.execute(select(supervisor_table)).one())


def _has_work(connection: Connection) -> bool:
    unfinished = [state.value for state in JobState if not state.ended]
    query = select(jobs_table.c.seq).where(jobs_table.c.state.in_(unfinished)).limit(1)
    return connection.execute(query).first() is not None


def _next_turn(connection: Connection) -> int:
    # PostgreSQL: also waits for a supervisor that is just leaving, see `release_lease`. Always before a job's row is
    # locked, so that no two transactions wait for each other.
    turns = supervisor_table.c.turns
    turn: int = connection.execute(update(supervisor_table).values(turns=turns + 1).returning(turns)).scalar_one()
    return turn


def _json(artifacts: tuple[Artifact, ...]) -> str:
    return ARTIFACTS.dump_json(artifacts).decode()
