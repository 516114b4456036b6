"""What owners use of a server, and whether that is within their limits (`spec.limits_config`).

These are parts of the store's transactions. A submission counts and inserts in one transaction, and before that it
takes the next turn (`queue.next_turn`), which only one transaction at a time can do. So two submissions never both get
the last place.

GPU time is counted over the last 24 hours, from when a job was claimed until it ended or was put back. Each stretch is
a row of `moe_gpu_use`, which stays when its job is deleted. Jobs on a cluster use no GPU of this machine and count 0.
"""

import itertools
import math
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, insert, select

from llama_stack_provider_moe.control.store.schema import TableRow, gpu_use_table, jobs_table
from llama_stack_provider_moe.errors import OverLimit
from llama_stack_provider_moe.ground.clock import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

DAY = timedelta(hours=24)
HOUR_S = 3600.0
PLACE_RETRY_S = 60  # nobody knows when a waiting job starts
NONE = LimitsConfig()
_J, _U = jobs_table.c, gpu_use_table.c


class Stretch(NamedTuple):
    """A time during which a job held GPUs."""

    gpus: int
    started_at: datetime
    ended_at: datetime

    def seconds_until(self, moment: datetime) -> float:
        """Return the GPU-seconds before `moment`."""
        return self.gpus * max(0.0, (min(self.ended_at, moment) - self.started_at).total_seconds())


class Use(NamedTuple):
    """What an owner uses.

    Attributes:
        waiting: jobs that wait.
        running: jobs in progress.
        stretches: GPU time of the last 24 hours.
        at: the moment of the count.
    """

    waiting: int
    running: int
    stretches: tuple[Stretch, ...]
    at: datetime

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours of the last 24 hours."""
        return self._seconds_since(self.at - DAY) / HOUR_S

    def gpus_free_at(self, limit_hours: float) -> datetime | None:
        """Return when less than `limit_hours` are used, if no job runs meanwhile; None: now."""
        if self.gpu_hours < limit_hours:
            return None
        # What was used since `start` falls as `start` grows, and its slope changes only where a stretch begins or ends.
        moments = sorted({self.at - DAY, *(each for one in self.stretches for each in one[1:] if each > self.at - DAY)})
        limit_s = limit_hours * HOUR_S
        for start, end in itertools.pairwise(moments):
            left_s, after_s = self._seconds_since(start), self._seconds_since(end)
            if after_s < limit_s:
                part = (left_s - limit_s) / (left_s - after_s)
                return start + part * (end - start) + DAY
        return self.at + DAY

    def _seconds_since(self, start: datetime) -> float:
        return sum(each.seconds_until(self.at) - each.seconds_until(start) for each in self.stretches)


def use_of(connection: Connection, owner: str) -> Use:
    """Return what an owner uses now."""
    states = select(_J.state, func.count()).where(_J.owner == owner).group_by(_J.state)
    counts: dict[str, int] = {row[0]: row[1] for row in connection.execute(states)}
    moment = now()
    return Use(
        counts.get(JobState.SCHEDULED.value, 0),
        counts.get(JobState.IN_PROGRESS.value, 0),
        _stretches(connection, moment).get(owner, ()),
        moment,
    )


def must_have_left(connection: Connection, owner: str, limits: LimitsConfig, jobs: int = 1) -> None:
    """Raise `OverLimit` unless more jobs of the owner may wait. Call it after `queue.next_turn`.

    Args:
        connection: A connection inside a transaction.
        owner: The owner.
        limits: What the owner may use.
        jobs: Number of the new jobs.
    """
    if limits.waiting_jobs is None and limits.gpu_hours_per_day is None:
        return
    use = use_of(connection, owner)
    most = limits.waiting_jobs
    if most is not None and use.waiting + jobs > most:
        more = "" if jobs == 1 else f", and {jobs} are needed"
        raise OverLimit(
            f"you have {use.waiting} jobs that wait, and this server allows {most} (`limits.waiting_jobs`), so "
            f"{max(0, most - use.waiting)} are left{more}; try again when one of them has started, or cancel one "
            "(moe-train cancel JOB)",
            PLACE_RETRY_S,
        )
    hours = limits.gpu_hours_per_day
    free_at = None if hours is None else use.gpus_free_at(hours)
    if free_at is not None:
        raise OverLimit(
            f"your jobs used {use.gpu_hours:.2f} GPU-hours in 24 hours, and this server allows {hours:g} "
            f"(`limits.gpu_hours_per_day`), so 0 are left; some are free again at {free_at:%Y-%m-%dT%H:%M:%SZ}",
            math.ceil((free_at - use.at).total_seconds()) + 1,
        )


class Held(NamedTuple):
    """Owners whose jobs don't start now.

    Attributes:
        all: none of their jobs starts: `running_jobs` of them run.
        on_gpus: none of their jobs starts on GPUs: the GPU-hours of a day are used.
    """

    all: frozenset[str]
    on_gpus: frozenset[str]


def held(connection: Connection, limits: LimitsConfig) -> Held:
    """Return which owners are at a limit."""
    full, spent = set(), set()
    if limits.running_jobs is not None:
        counts = select(_J.owner).where(_J.state == JobState.IN_PROGRESS.value).group_by(_J.owner)
        full = set(connection.execute(counts.having(func.count() >= limits.running_jobs)).scalars())
    if limits.gpu_hours_per_day is not None:
        moment = now()
        for owner, stretches in _stretches(connection, moment).items():
            if Use(0, 0, stretches, moment).gpu_hours >= limits.gpu_hours_per_day:
                spent.add(owner)
    return Held(frozenset(full), frozenset(spent))


def record_use(connection: Connection, row: TableRow) -> None:
    """Write down the GPU time of a job that is about to leave `in_progress`; `row` is as it was."""
    gpus = _count(row.devices)
    if row.state != JobState.IN_PROGRESS.value or not gpus or row.started_at is None:
        return
    moment = now()
    connection.execute(delete(gpu_use_table).where(_U.ended_at < moment - 2 * DAY))
    connection.execute(
        insert(gpu_use_table).values(owner=row.owner, gpus=gpus, started_at=row.started_at, ended_at=moment)
    )


def owners(connection: Connection) -> set[str]:
    """Return every owner of a job, or of GPU time that still counts."""
    found = set(connection.execute(select(_J.owner).distinct()).scalars())
    return found | set(connection.execute(select(_U.owner).where(_U.ended_at > now() - DAY).distinct()).scalars())


def _stretches(connection: Connection, moment: datetime) -> dict[str, tuple[Stretch, ...]]:
    found: dict[str, tuple[Stretch, ...]] = {}
    past = select(_U.owner, _U.gpus, _U.started_at, _U.ended_at).where(_U.ended_at > moment - DAY)
    for row in connection.execute(past):
        found[row.owner] = (*found.get(row.owner, ()), Stretch(row.gpus, row.started_at, row.ended_at))
    runs = _J.state == JobState.IN_PROGRESS.value
    running = select(_J.owner, _J.devices, _J.started_at).where(runs, _J.started_at.is_not(None))
    for owner, devices, started_at in connection.execute(running):
        if gpus := _count(devices):
            found[owner] = (*found.get(owner, ()), Stretch(gpus, started_at, moment))
    return found


def _count(devices: str | None) -> int:
    return len(devices.split(",")) if devices else 0
