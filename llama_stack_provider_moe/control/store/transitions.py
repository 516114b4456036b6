"""How a supervisor moves jobs: its parts of the store's transactions.

A supervisor may be paused at any point (a suspended machine, a slow disk) while another one takes over. So each change
depends on what the supervisor saw, its `Fence`: the same attempt, the same process, and the lease still held. The rows
are locked during the check, and the update repeats the conditions. Locks are taken in this order: the lease, then jobs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, exists, select, update

from llama_stack_provider_moe.control.store import lease, queue, trial_rows
from llama_stack_provider_moe.control.store.job_row import Job, as_job, change, find
from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table, supervisor_table
from llama_stack_provider_moe.errors import Conflict, NotFound, Superseded
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import JobState, check_move
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

# Changes for a job that goes back into the queue. Its artifacts stay, for the case that it is cancelled there.
WAITS: dict[str, object] = {
    "state": JobState.SCHEDULED.value, "ended_at": None, "cancel_requested_at": None, "stopped_by": None,
    "devices": None, "supervisor": None, "pid": None, "pid_birth": None, "run": None,
}  # fmt: skip

First = Callable[[], None]


class Fence(NamedTuple):
    """What must still hold when a supervisor changes a job.

    All but the first are values of the job as the supervisor saw it.

    Attributes:
        supervisor: The supervisor that must hold the lease.
        state: State of the job.
        attempts: How often the job was claimed; the fencing token.
        pid: Pid of its process.
        pid_birth: Time of birth of its process.
        run: Its name on a cluster.
    """

    supervisor: str
    state: JobState
    attempts: int
    pid: int | None
    pid_birth: float | None
    run: str | None

    @classmethod
    def of(cls, supervisor_id: str, job: Job) -> "Fence":
        """Return the fence for a job as this supervisor sees it."""
        return cls(supervisor_id, job.state, job.attempts, job.pid, job.pid_birth, job.run)

    def check(self, row: TableRow) -> None:
        """Raise `Superseded` if the row has changed since it was seen."""
        seen, found = self[1:], (JobState(row.state), row.attempts, row.pid, row.pid_birth, row.run)
        if seen != found:
            raise Superseded(
                f"job {row.id!r} was changed by another supervisor: it was {_described(*seen)}, and is "
                f"{_described(*found)}; left alone"
            )


def _described(state: JobState, attempts: int, pid: int | None, _birth: float | None, run: str | None) -> str:
    return f"{state.value} at attempt {attempts} with process {run or pid}"


def locked(connection: Connection, job_id: str, fence: Fence | None) -> TableRow:
    """Lock a job's row for this transaction and return it.

    Raises:
        LeaseLost, Superseded: The fence does not hold. A deleted job also counts as superseded.
        NotFound: There is no such job, and no fence was given.
    """
    if fence is None:
        return find(connection, job_id, lock=True)
    lease.require(connection, fence.supervisor)
    try:
        row = find(connection, job_id, lock=True)
    except NotFound:
        raise Superseded(f"job {job_id!r} was deleted meanwhile") from None
    fence.check(row)
    return row


def write(connection: Connection, row: TableRow, changes: dict[str, object], fence: Fence | None) -> Job:
    """Write changes in one statement that repeats the fence's conditions.

    Args:
        connection: A connection inside a transaction.
        row: A row from `locked`.
        changes: New values by column.
        fence: What must still hold; None for no condition.
    """
    if fence is None:
        return change(connection, row, changes)
    table = jobs_table.c
    seen = (
        table.seq == row.seq, table.state == fence.state.value, table.attempts == fence.attempts,
        table.pid.is_not_distinct_from(fence.pid), table.run.is_not_distinct_from(fence.run),
        exists().where(supervisor_table.c.holder == fence.supervisor),
    )  # fmt: skip
    if connection.execute(update(jobs_table).where(*seen).values(**changes)).rowcount != 1:
        raise Superseded(f"job {row.id!r} was changed by another supervisor; left alone")
    return as_job(find(connection, row.id))


def claim(
    connection: Connection, supervisor_id: str, devices: Sequence[str] | None, leased: bool, limits: LimitsConfig
) -> Job | None:
    """See `JobStore.claim`."""
    # On PostgreSQL, too, only one claim runs at a time: devices and fairness are counted over several rows.
    if leased:
        lease.require(connection, supervisor_id)
    else:
        connection.execute(select(supervisor_table.c.id).with_for_update())
    choice = queue.pick(connection, devices, limits)
    if choice.kept is not None:
        kept = (jobs_table.c.seq == choice.kept.seq, jobs_table.c.state == JobState.SCHEDULED.value)
        connection.execute(update(jobs_table).where(*kept).values(turn=0))
    if choice.job is None:
        return None
    # If a cancellation holds the job's row, skip the job: the claim must not wait.
    mine = (jobs_table.c.seq == choice.job.seq, jobs_table.c.state == JobState.SCHEDULED.value)
    row = connection.execute(select(jobs_table).where(*mine).with_for_update(skip_locked=True)).first()
    if row is None:
        return None
    return change(connection, row, {
        "state": JobState.IN_PROGRESS.value, "started_at": now(), "attempts": row.attempts + 1,
        "supervisor": supervisor_id, "pid": None, "pid_birth": None, "run": None,
        "devices": choice.devices,
    })  # fmt: skip


def check_resumable(row: TableRow) -> None:
    """Raise `Conflict` unless the job failed or was cancelled."""
    state = JobState(row.state)
    if state is JobState.COMPLETED:
        raise Conflict(f"job {row.id!r} has completed; there is nothing left to resume")
    if not state.ended:
        raise Conflict(f"job {row.id!r} is {state.value}; only a cancelled or failed job can be resumed")
    check_move(row.id, state, JobState.SCHEDULED)


def resume(connection: Connection, row: TableRow, turn: int) -> Job:
    """Put a job that failed or was cancelled back into the queue."""
    trial_rows.may_change(connection, row.id)
    return change(connection, row, WAITS | {"queued_at": now(), "turn": turn, "lost": 0, "reason": None})


def check_launchable(row: TableRow, new_process: object) -> None:
    """Raise `Conflict` unless the job is in progress and has no process."""
    if row.state != JobState.IN_PROGRESS.value or row.pid is not None or row.run is not None:
        raise Conflict(
            f"job {row.id!r} is {row.state} with process {row.run or row.pid}; it can't get process {new_process}"
        )


def check_lost(row: TableRow) -> None:
    """Raise `Conflict` unless the job can be tried again."""
    if row.state != JobState.IN_PROGRESS.value:
        raise Conflict(f"job {row.id!r} is {row.state}; only a job in progress can lose its process")
    if row.cancel_requested_at is not None:
        raise Conflict(f"job {row.id!r} is being cancelled; it is not tried again")
