"""`Moves`: the part of `JobStore` that supervisors use: state changes and the lease. Each method is one transaction."""

from collections.abc import Sequence

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError

from llama_stack_provider_moe.control.store import (
    lease,
    limits,
    outbox,
    parent_jobs,
    pipeline_ends,
    queue,
    transitions,
    trial_rows,
)
from llama_stack_provider_moe.control.store.job_row import ARTIFACTS, Job, as_job
from llama_stack_provider_moe.control.store.lease import LiveSupervisor, holder
from llama_stack_provider_moe.control.store.parent_jobs import NewJob
from llama_stack_provider_moe.control.store.schema import jobs_table, supervisor_table
from llama_stack_provider_moe.control.store.transitions import WAITS, Fence, First
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.jobdir.state import ENDED, JobState, check_move
from llama_stack_provider_moe.spec.limits_config import LimitsConfig


class Moves:
    """The supervisor's part of `JobStore`, which opens the engines."""

    _reading: Engine
    _writing: Engine

    def claim(
        self,
        supervisor_id: str,
        devices: Sequence[str] | None = None,
        leased: bool = False,
        owner_limits: LimitsConfig = limits.NONE,
    ) -> Job | None:
        """Claim the next job that fits: it becomes `in_progress`, with one more attempt and no process yet.

        Returns None if no job fits, or the next one is just being cancelled; ask again at the next poll.

        Args:
            supervisor_id: Id of the supervisor that claims the job.
            devices: All devices that may be assigned, free or not; None if none are known. No two jobs in progress
                get the same device.
            leased: Claim only if this supervisor holds the lease. Every supervisor sets this.
            owner_limits: What each owner may use; jobs of owners at a limit wait.

        Raises:
            LeaseLost: `leased` is set and another supervisor holds the lease.
        """
        with self._reading.begin() as connection:  # most polls find nothing and then need no write lock
            if queue.pick(connection, devices, owner_limits) == queue.NOTHING:
                return None
        with self._writing.begin() as connection:
            return transitions.claim(connection, supervisor_id, devices, leased, owner_limits)

    def would_start_without(
        self, recipe: str, devices: Sequence[str] | None, owner_limits: LimitsConfig = limits.NONE
    ) -> bool:
        """Return whether a job waits that could start if no job of this recipe ran.

        Args:
            recipe: The recipe whose jobs count as ended.
            devices: See `claim`.
            owner_limits: See `claim`.
        """
        with self._reading.begin() as connection:
            return queue.pick(connection, devices, owner_limits, but=recipe).job is not None

    def asking_for_more(self, gpus: int) -> list[Job]:
        """Return waiting jobs that ask for more than `gpus` devices."""
        query = select(jobs_table).where(jobs_table.c.state == JobState.SCHEDULED.value, jobs_table.c.gpus > gpus)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query.order_by(jobs_table.c.seq))]

    def check_fence(self, job_id: str, fence: Fence) -> None:
        """Raise `Superseded` if the job has changed since it was seen, `LeaseLost` if the lease is lost."""
        with self._writing.begin() as connection:
            transitions.locked(connection, job_id, fence)

    def launched(
        self,
        job_id: str,
        pid: int | None,
        pid_birth: float | None,
        run: str | None = None,
        fence: Fence | None = None,
        first: First | None = None,
    ) -> Job:
        """Record the process of a job in progress, or its name on a cluster. The first to record one wins.

        Args:
            job_id: Id of the job.
            pid: Pid of the process.
            pid_birth: See `processes.birth`.
            run: The job's name on a cluster.
            fence: What must still hold; None checks only the state.
            first: Called while the fence holds and nobody else can move the job. If it raises, nothing is recorded.

        Raises:
            Conflict: The job is not in progress, or has a process already; `Superseded`, `LeaseLost`: see `Fence`.
        """
        with self._writing.begin() as connection:
            row = transitions.locked(connection, job_id, fence)
            transitions.check_launchable(row, run or pid)
            if first is not None:
                first()
            return transitions.write(connection, row, {"pid": pid, "pid_birth": pid_birth, "run": run}, fence)

    def requeue(
        self,
        job_id: str,
        reason: str,
        artifacts: tuple[Artifact, ...] = (),
        fence: Fence | None = None,
        first: First | None = None,
        lost: bool = True,
    ) -> Job:
        """Put a job whose process was lost back into the queue, ahead of all waiting jobs.

        Args:
            job_id: Id of the job.
            reason: Why the process was lost.
            artifacts: What the job has saved so far.
            fence: See `launched`.
            first: See `launched`.
            lost: Count the job's process as lost; False: it ended for another to take over.

        Raises:
            Conflict: The job is not in progress, or its cancellation was requested; `Superseded`, `LeaseLost`: see
                `Fence`.
        """
        with self._writing.begin() as connection:
            row = transitions.locked(connection, job_id, fence)
            transitions.check_lost(row)
            if first is not None:
                first()
            limits.record_use(connection, row)
            changes = WAITS | {
                "queued_at": now(), "turn": 0, "lost": row.lost + lost, "reason": reason,
                "artifacts": _json(artifacts),
            }  # fmt: skip
            return transitions.write(connection, row, changes, fence)

    def move(
        self,
        job_id: str,
        new_state: JobState,
        reason: str | None = None,
        artifacts: tuple[Artifact, ...] = (),
        stopped_by: str | None = None,
        export: NewJob | None = None,
        fence: Fence | None = None,
        first: First | None = None,
        lost: bool = False,
    ) -> Job:
        """Move a job to `new_state`. To put a job back into the queue, use `requeue` or `resume`.

        Args:
            job_id: Id of the job.
            new_state: The state to move to.
            reason: Why the job ended.
            artifacts: What the job left.
            stopped_by: What stopped a completed job before its last step.
            export: An export job to insert in the same transaction; both changes happen or neither does.
            fence: See `launched`.
            first: See `launched`.
            lost: Count the job's process as lost.

        Raises:
            Conflict: The move is not legal from the current state, or the export's id is taken; `Superseded`,
                `LeaseLost`: see `Fence`.
            NotFound: A job that the export needs was deleted.
        """
        assert new_state is not JobState.SCHEDULED, "a waiting job needs a turn"
        try:
            with self._writing.begin() as connection:
                turn = None if export is None else queue.next_turn(connection)
                row = transitions.locked(connection, job_id, fence)
                check_move(job_id, JobState(row.state), new_state)
                if first is not None:
                    first()
                limits.record_use(connection, row)
                outbox.write(connection, row, new_state)
                if new_state is JobState.CANCELLED:
                    reason = trial_rows.why_cancelled(connection, row, reason)
                changes = {
                    "state": new_state.value, "reason": reason, "artifacts": _json(artifacts),
                    "stopped_by": stopped_by, "ended_at": now() if new_state in ENDED else None,
                    "lost": row.lost + lost,
                }  # fmt: skip
                job = transitions.write(connection, row, changes, fence)
                if export is not None and turn is not None:
                    parent_jobs.insert_job(connection, export, turn)
                if new_state in ENDED:
                    pipeline_ends.tell(connection, row.pipeline, job_id)
                return job
        except IntegrityError:
            raise Conflict(f"job {job_id!r} could not end: the name of its export was just taken") from None

    def running(self) -> list[Job]:
        """Return all jobs in progress, oldest first, whichever supervisor claimed them."""
        query = select(jobs_table).where(jobs_table.c.state == JobState.IN_PROGRESS.value).order_by(jobs_table.c.seq)
        with self._reading.begin() as connection:
            return [as_job(row) for row in connection.execute(query)]

    def has_work(self) -> bool:
        """Return whether a supervisor has anything to do, see `lease.has_work`."""
        with self._reading.begin() as connection:
            return lease.has_work(connection)

    # The lease.

    def acquire_lease(self, supervisor_id: str, pid: int, lease_s: float) -> bool:
        """Become the store's supervisor for `lease_s` seconds; False if another supervisor holds the lease."""
        with self._writing.begin() as connection:
            return lease.acquire(connection, supervisor_id, pid, lease_s)

    def beat(self, supervisor_id: str, lease_s: float) -> bool:
        """Renew the lease; False if another supervisor has taken it."""
        with self._writing.begin() as connection:
            return lease.renew(connection, supervisor_id, lease_s)

    def release_lease(self, supervisor_id: str, only_if_idle: bool) -> bool:
        """Give up the lease; False if it is not held, or (with `only_if_idle`) a job waits or runs.

        A supervisor that leaves can't strand a job that a server submits at the same time: one of the two transactions
        comes first. If the submission is first, this method sees the job and the supervisor stays; otherwise the
        server finds the lease free and starts a supervisor.
        """
        with self._writing.begin() as connection:
            return lease.release(connection, supervisor_id, only_if_idle)

    def live_supervisor(self) -> LiveSupervisor | None:
        """Return the holder of the lease; None if the lease is free or has expired."""
        return lease.live(self.last_supervisor())

    def last_supervisor(self) -> LiveSupervisor | None:
        """Return the holder of the lease, even if it has expired; None if the lease is free."""
        with self._reading.begin() as connection:
            return holder(connection.execute(select(supervisor_table)).one())


def _json(artifacts: tuple[Artifact, ...]) -> str:
    return ARTIFACTS.dump_json(artifacts).decode()
