"""The supervisor's lease, as one row of the store tells of it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row


@dataclass(frozen=True)
class LiveSupervisor:
    """The holder of the lease."""

    id: str
    pid: int
    beat_at: datetime
    lease_s: float

    def is_live(self, moment: datetime) -> bool:
        """True where the lease has not run out.

        Both ways: a clock that was set back must not keep a dead supervisor's lease alive for hours. That it may end
        a live one's early, see `Supervisor.acquire`.
        """
        return abs((moment - self.beat_at).total_seconds()) < self.lease_s


def holder(row: Row[Any]) -> LiveSupervisor | None:
    """Whom the row of `moe_supervisor` names."""
    return None if row.holder is None else LiveSupervisor(row.holder, row.pid, row.beat_at, row.lease_s)
