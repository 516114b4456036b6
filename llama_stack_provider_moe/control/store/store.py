"""`JobStore`: the only place that keeps the state of jobs and the lease of the supervisor that runs them.

Every method is one transaction. Reads are cheap. The database serialises the writes of several processes, so a job is
claimed only once, and a move is checked against the job's actual state.
"""

from collections.abc import Callable, Iterable
from datetime import datetime

from sqlalchemy import PoolProxiedConnection, func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from llama_stack_provider_moe.control.store import (
    labels,
    limits,
    outbox,
    parent_jobs,
    pipeline_ends,
    queue,
    transitions,
    wait_rows,
)
from llama_stack_provider_moe.control.store.dataset_rows import DatasetTable
from llama_stack_provider_moe.control.store.job_counts import JobCounts, count_jobs
from llama_stack_provider_moe.control.store.job_filter import EVERY_JOB, JobFilter
from llama_stack_provider_moe.control.store.job_row import Job, as_job, change, find
from llama_stack_provider_moe.control.store.labels import LabelChange, LabelledJob
from llama_stack_provider_moe.control.store.lease import LiveSupervisor
from llama_stack_provider_moe.control.store.moves import Moves
from llama_stack_provider_moe.control.store.opening import for_reading, open_engine
from llama_stack_provider_moe.control.store.outbox import Outbox
from llama_stack_provider_moe.control.store.owners import belongs_to
from llama_stack_provider_moe.control.store.parent_jobs import NewJob
from llama_stack_provider_moe.control.store.pipeline_rows import PipelineTable
from llama_stack_provider_moe.control.store.schema import identity_table, jobs_table, supervisor_table
from llama_stack_provider_moe.control.store.sweep_rows import SweepTable
from llama_stack_provider_moe.control.store.wait_table import WaitTable
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import JobState, check_move
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

__all__ = ["CANCELLED_WAITING", "Job", "JobStore", "Jobs", "LiveSupervisor", "NewJob"]

CANCELLED_WAITING = "cancelled before it started"
_CANCELLED_AGAIN = "cancelled while it waited to resume"

# Inside the class, `JobStore.list` hides the built-in.
Jobs = list[Job]
Queue = list[tuple[Job, int]]  # jobs and their positions


class JobStore(Moves):
    """Jobs and the supervisor's lease, in SQLite or PostgreSQL. Threads can share one instance.

    Args:
        url: SQLAlchemy URL. A SQLite database must be a file on a local disk (WAL needs shared memory).

    Attributes:
        datasets: The data sets that owners uploaded.
        sweeps: Sweeps, whose jobs are ordinary jobs.
        pipelines: Pipelines, whose parts are ordinary jobs.
        waits: Jobs that wait for other jobs.
        outbox: Messages about jobs that ended.
    """

    def __init__(self, url: str) -> None:
        engine = open_engine(url)
        self._reading = for_reading(engine)
        self._writing = engine.execution_options(writes=True)
        self.datasets = DatasetTable(self._reading, self._writing)
        self.sweeps = SweepTable(self._reading, self._writing)
        self.pipelines = PipelineTable(self._reading, self._writing)
        self.waits = WaitTable(self._reading, self._writing)
        self.outbox = Outbox(self._reading, self._writing)
        self._looking: PoolProxiedConnection | None = None
        self._version: int | None = None

    def close(self) -> None:
        """Close every connection. Afterwards no thread can use the store."""
        if self._looking is not None:
            self._looking.close()
            self._looking = None
        self._reading.dispose()

    @property
    def is_embedded(self) -> bool:
        """Whether the database is a local file. Then a failed transaction has certainly not happened."""
        return self._reading.dialect.name == "sqlite"

    def identity(self) -> str:
        """Return the id of this store, which does not depend on the URL."""
        with self._reading.begin() as connection:
            return str(connection.execute(select(identity_table.c.id)).scalar_one())

    def check(self) -> None:
        """Raise unless the store answers."""
        with self._reading.begin() as connection:
            connection.execute(select(supervisor_table.c.id)).one()

    def answers(self) -> bool:
        """Return False if the database can't be reached or read (`check` raises the reason); `StoreReplaced` passes."""
        try:
            self.check()
        except SQLAlchemyError:
            return False
        return True

    def has_changed(self) -> bool:
        """Return False if nothing was written since the last call. Only the supervisor may call it.

        It reads a number in shared memory (sqlite.org/pragma.html#pragma_data_version), some 400 times cheaper than
        queries that find nothing to do. PostgreSQL has no such number, so the answer is always True.
        """
        if self._reading.dialect.name != "sqlite":
            return True
        if self._looking is None:
            # A separate connection that never writes, because a connection's own changes do not change the number.
            self._looking = self._reading.raw_connection()
        cursor = self._looking.cursor()
        cursor.execute("PRAGMA data_version")
        ((version,),) = cursor.fetchall()
        before, self._version = self._version, version
        cursor.close()
        return before != self._version

    # Jobs, as their owners see them. `owner=None` means any owner, for the supervisor and administrators.

    def submit(self, job_id: str, owner: str, recipe: str, model: str, folder: str, gpus: int | None = None) -> Job:
        """Insert a job as `scheduled`, at the end of its owner's queue.

        Args:
            job_id: Unique among the jobs of all owners.
            owner: The only user who will see it.
            recipe: The kind of training, for lists.
            model: The model, for lists.
            folder: Absolute path of its folder.
            gpus: Requested devices; None: one if the machine that runs it has any, else the CPU.

        Raises:
            Conflict: The id is taken, by any owner.
        """
        return self.add(NewJob(job_id, owner, recipe, model, folder, gpus))

    def add(self, new: NewJob, owner_limits: LimitsConfig = limits.NONE) -> Job:
        """Insert a job of any kind, see `submit`.

        Args:
            new: The job.
            owner_limits: What its owner may use.
            first: Called once the job may be resumed, while no supervisor can start it. If it raises, nothing changes.

        Raises:
            OverLimit: Its owner is at a limit.
            NotFound: Its parent does not exist.
            Conflict: The id is taken, or its parent has not completed.
        """
        try:
            with self._writing.begin() as connection:
                turn = queue.next_turn(connection)
                limits.must_have_left(connection, new.owner, owner_limits)
                return parent_jobs.insert_job(connection, new, turn)
        except IntegrityError:
            raise Conflict(f"job {new.id!r} exists already; leave out job_uuid or choose another") from None

    def exports(self, job_id: str) -> Jobs:
        """Return a job's exports, newest first."""
        with self._reading.begin() as connection:
            return [as_job(row) for row in parent_jobs.exports_of(connection, job_id)]

    def get(self, job_id: str, owner: str | None) -> Job:
        """Return the job; raise `NotFound` if it does not exist or belongs to another owner."""
        with self._reading.begin() as connection:
            return as_job(find(connection, job_id, owner))

    def list(
        self, owner: str | None, limit: int = 1000, after: str | None = None, chosen: JobFilter = EVERY_JOB
    ) -> Jobs:
        """Return a page of jobs, newest first.

        Args:
            owner: Owner of the jobs; None for all owners.
            limit: The largest number of jobs.
            after: Id of the last job of the previous page.
            chosen: Which of them to return.

        Raises:
            NotFound: There is no job `after`.
        """
        query = select(jobs_table).where(*chosen.conditions()).order_by(jobs_table.c.seq.desc()).limit(limit)
        if owner is not None:
            query = query.where(belongs_to(owner))
        with self._reading.begin() as connection:
            if after is not None:
                query = query.where(jobs_table.c.seq < find(connection, after, owner).seq)
            return [as_job(row) for row in connection.execute(query)]

    def labels(self, job_ids: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the labels of jobs, by job and key; jobs without labels are left out."""
        with self._reading.begin() as connection:
            return labels.of(connection, job_ids)

    def label(self, job_id: str, owner: str | None, asked: LabelChange) -> LabelledJob:
        """Change the labels and the note of a job, see `labels.apply`."""
        with self._writing.begin() as connection:
            return labels.apply(connection, job_id, owner, asked)

    def request_cancel(self, job_id: str, owner: str | None) -> Job:
        """Request that a job be cancelled. You can repeat the request.

        A scheduled job is `cancelled` at once. A job in progress is marked, and the supervisor stops it.

        Raises:
            NotFound: The owner has no such job.
            Conflict: The job has completed or failed.
        """
        with self._writing.begin() as connection:
            row = find(connection, job_id, owner, lock=True)
            state = JobState(row.state)
            if state is JobState.CANCELLED or (state is JobState.IN_PROGRESS and row.cancel_requested_at):
                return as_job(row)
            check_move(job_id, state, JobState.CANCELLED)
            moment = now()
            changes: dict[str, object] = {"cancel_requested_at": moment}
            if state is JobState.SCHEDULED:
                outbox.write(connection, row, JobState.CANCELLED)
                changes |= {
                    "state": JobState.CANCELLED.value,
                    "ended_at": moment,
                    "reason": _CANCELLED_AGAIN if row.attempts else CANCELLED_WAITING,
                }
            job = change(connection, row, changes)
            if state is JobState.SCHEDULED:
                pipeline_ends.tell(connection, row.pipeline, job_id)
            return job

    def use_of(self, owner: str) -> limits.Use:
        """Return what an owner uses of the server now."""
        with self._reading.begin() as connection:
            return limits.use_of(connection, owner)

    def must_have_left(self, owner: str, owner_limits: LimitsConfig, jobs: int = 1) -> None:
        """Raise `OverLimit` if the owner can't have so many more jobs wait now; `add` and `resume` decide."""
        with self._reading.begin() as connection:
            limits.must_have_left(connection, owner, owner_limits, jobs)

    def owners(self) -> set[str]:
        """Return every owner of jobs, data sets, or GPU time of the last 24 hours."""
        with self._reading.begin() as connection:
            return limits.owners(connection) | self.datasets.owners(connection)

    def resume(
        self,
        job_id: str,
        owner: str | None,
        owner_limits: LimitsConfig = limits.NONE,
        first: Callable[[], None] | None = None,
    ) -> Job:
        """Put a cancelled or failed job back into the queue, at the end of its owner's jobs.

        Args:
            job_id: Id of the job.
            owner: Owner of the job; None for any owner.
            owner_limits: What its owner may use.

        Raises:
            OverLimit: Its owner is at a limit.
            NotFound: The owner has no such job.
            Conflict: The job has completed, already waits or runs, or waits for a job that will not complete.
        """
        with self._writing.begin() as connection:
            turn = queue.next_turn(connection)
            row = find(connection, job_id, owner, lock=True)
            transitions.check_resumable(row)
            wait_rows.must_not_be_broken(connection, job_id)
            limits.must_have_left(connection, row.owner, owner_limits)
            if first is not None:
                first()
            return transitions.resume(connection, row, turn)

    def delete(
        self,
        job_id: str,
        owner: str | None,
        first: Callable[[Job], None] | None = None,
        force: Callable[[Jobs], None] | None = None,
    ) -> Jobs:
        """Delete a job that has ended, and its exports.

        Args:
            job_id: Id of the job.
            owner: Owner of the job; None for any owner.
            first: Called with each of them, the job last, once none can be resumed. If it raises, they stay.
            force: Delete them even if other jobs need their files; called with those jobs, before `first`.

        Returns:
            The job as it was, then its exports.

        Raises:
            NotFound: The owner has no such job.
            Conflict: The job or one of its exports waits or runs, or other jobs need their files.
        """
        with self._writing.begin() as connection:
            return parent_jobs.delete_family(connection, job_id, owner, first, force)

    def while_locked(self, job_id: str, action: Callable[[Job], None]) -> bool:
        """Call `action` while nobody can change or delete the job; without a job, only return False."""
        with self._writing.begin() as connection:
            try:
                row = find(connection, job_id, lock=True)
            except NotFound:
                return False
            action(as_job(row))
            return True

    def dependents(self, *job_ids: str) -> Jobs:
        """Return other jobs that need files of these jobs or of their exports."""
        with self._reading.begin() as connection:
            exports = [row.id for each in job_ids for row in parent_jobs.exports_of(connection, each)]
            return parent_jobs.dependents_of(connection, [*job_ids, *exports])

    def ended_before(self, moment: datetime, limit: int = 100, needed: bool = False) -> Jobs:
        """Return at most `limit` jobs of all owners that, with their exports, ended before `moment`; oldest first.

        Args:
            moment: The time to compare with.
            limit: The largest number of jobs.
            needed: Return the jobs whose files other jobs need, instead of those whose files no job needs.
        """
        column, old = jobs_table.c.ended_at, parent_jobs.has_no_younger_export(moment)
        wanted = parent_jobs.is_needed() if needed else ~parent_jobs.is_needed()
        query = select(jobs_table).where(column < moment, old, wanted).order_by(column, jobs_table.c.seq).limit(limit)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query)]

    def queue_position(self, job_id: str) -> int:
        """Return 1 for the job that is claimed next, 2 for the one after it, and so on.

        0 is a job that does not wait, or that waits for other jobs. A job that needs no device may overtake one that
        waits for devices, see `queue`.
        """
        with self._reading.begin() as connection:
            row = find(connection, job_id)
            return queue.position(connection, row) if row.state == JobState.SCHEDULED.value else 0

    def first_waiting(self, owner: str | None, limit: int) -> tuple[Queue, int]:
        """Return the first waiting jobs with their positions in the queue, and how many wait in all.

        Jobs that wait for other jobs come last, with position 0.

        Args:
            owner: Owner of the jobs; None for all owners.
            limit: The largest number of jobs.
        """
        with self._reading.begin() as connection:
            rows, count = queue.first_waiting(connection, owner, limit)
            found = [(as_job(row), queue.position(connection, row)) for row in rows]
            return sorted(found, key=lambda each: each[1] or len(rows) + 1), count

    def counts(self, owner: str | None = None) -> dict[JobState, int]:
        """Return the number of jobs in each state, of all owners or of one."""
        query = select(jobs_table.c.state, func.count().label("jobs")).group_by(jobs_table.c.state)
        if owner is not None:
            query = query.where(belongs_to(owner))
        with self._reading.begin() as connection:
            found = dict.fromkeys(JobState, 0)
            for state, jobs in connection.execute(query):
                found[JobState(state)] += jobs
        return found

    def job_counts(self, since: datetime | None = None) -> JobCounts:
        """Count the jobs of all owners, and list those that ended after `since`."""
        with self._reading.begin() as connection:
            return count_jobs(connection, since)
