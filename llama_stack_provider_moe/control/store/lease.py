"""The supervisor's lease: one row of the store, and the parts of transactions that use it."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select, update

from llama_stack_provider_moe.control.store import trial_rows
from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table, supervisor_table, webhooks_table
from llama_stack_provider_moe.errors import LeaseLost
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import UNFINISHED

MESSAGE_WAITS = "waiting"  # state of a message that was not delivered yet, see `outbox`


@dataclass(frozen=True)
class LiveSupervisor:
    """The holder of the lease."""

    id: str
    pid: int
    beat_at: datetime
    lease_s: float

    def is_live(self, moment: datetime) -> bool:
        """True if the lease has not expired.

        The difference counts in both directions: a clock that was set back must not keep a dead supervisor's lease
        alive for hours. `Supervisor.acquire` handles the case where this ends a live supervisor's lease early.
        """
        return abs((moment - self.beat_at).total_seconds()) < self.lease_s


def holder(row: TableRow) -> LiveSupervisor | None:
    """Return the supervisor that the row of `moe_supervisor` names."""
    return None if row.holder is None else LiveSupervisor(row.holder, row.pid, row.beat_at, row.lease_s)


def live(last: LiveSupervisor | None) -> LiveSupervisor | None:
    """Return the holder unless its lease has expired."""
    return last if last is not None and last.is_live(now()) else None


def require(connection: Connection, supervisor_id: str) -> None:
    """Raise `LeaseLost` unless this supervisor holds the lease. Nobody can take it until the transaction ends.

    An expired lease that nobody took is still held.
    """
    found = connection.execute(select(supervisor_table.c.holder).with_for_update()).scalar_one()
    if found != supervisor_id:
        raise LeaseLost(f"supervisor {supervisor_id} does not hold the lease; {found or 'nobody'} does")


def acquire(connection: Connection, supervisor_id: str, pid: int, lease_s: float) -> bool:
    """See `JobStore.acquire_lease`."""
    row = connection.execute(select(supervisor_table).with_for_update()).one()
    other = holder(row)
    if other is not None and other.id != supervisor_id and other.is_live(now()):
        return False
    connection.execute(update(supervisor_table).values(holder=supervisor_id, pid=pid, beat_at=now(), lease_s=lease_s))
    return True


def renew(connection: Connection, supervisor_id: str, lease_s: float) -> bool:
    """See `JobStore.beat`."""
    mine = update(supervisor_table).where(supervisor_table.c.holder == supervisor_id)
    return connection.execute(mine.values(beat_at=now(), lease_s=lease_s)).rowcount == 1


def release(connection: Connection, supervisor_id: str, only_if_idle: bool) -> bool:
    """See `JobStore.release_lease`."""
    row = connection.execute(select(supervisor_table).with_for_update()).one()
    if row.holder != supervisor_id or (only_if_idle and has_work(connection)):
        return False
    connection.execute(update(supervisor_table).values(holder=None, pid=None, beat_at=None, lease_s=None))
    return True


def has_work(connection: Connection) -> bool:
    """Return whether a supervisor has anything to do.

    A job waits or runs, a message about one waits, or figures of a job of a sweep are not yet read.
    """
    query = select(jobs_table.c.seq).where(jobs_table.c.state.in_(UNFINISHED)).limit(1)
    if connection.execute(query).first() is not None:
        return True
    waits = select(webhooks_table.c.seq).where(webhooks_table.c.state == MESSAGE_WAITS).limit(1)
    return connection.execute(waits).first() is not None or trial_rows.are_unread(connection)
