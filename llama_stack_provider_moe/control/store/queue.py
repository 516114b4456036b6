"""Which job is next: fair between owners, first come first served within an owner.

The order is the one in which jobs would be claimed if none ended meanwhile:

1. Jobs whose turn is 0, by submission: their process was lost, or devices are kept for them.
2. Then the owner with the fewest jobs in progress; among equals, the one served longest ago; among those, the one
   whose job has waited longest. Of that owner, the job with the lowest turn. Each claim adds one to the owner's jobs in
   progress.

A job that needs more devices than are free waits, but not for ever: the first such job gets turn 0, and from then on
free devices are kept for it. Jobs that need no devices may overtake it, because they take nothing that it waits for.

Jobs of an owner who is at a limit (`limits`), and jobs of a sweep of which as many run as may, are passed over until
that changes. Positions do not foresee that. Jobs that wait for other jobs (`wait_rows`) have no position, and are
passed over too.

Step 2 needs no simulation. If an owner has c jobs in progress, the owner's n-th waiting job (from 0) is claimed at
level c + n. Lower levels come first. Within a level, owners served longest ago come first; an owner who would be served
during the simulation (n > 0) counts as served later than all others, and later the larger n is.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, or_, select, true, update

from llama_stack_provider_moe.control.store import limits as owner_limits
from llama_stack_provider_moe.control.store import trial_rows, wait_rows
from llama_stack_provider_moe.control.store.owners import belongs_to
from llama_stack_provider_moe.control.store.schema import TableRow, jobs_table, supervisor_table
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig

_T = jobs_table.c
_WAITS = and_(_T.state == JobState.SCHEDULED.value, ~wait_rows.waits_for_jobs())
_RUNS = _T.state == JobState.IN_PROGRESS.value


class ClaimChoice(NamedTuple):
    """What a claim does: it assigns `devices` to `job`, and keeps free devices for the job `kept` from now on."""

    job: TableRow | None
    devices: str | None
    kept: TableRow | None


NOTHING = ClaimChoice(None, None, None)


class _Owner(NamedTuple):
    """One owner's part of the queue, after the jobs with turn 0 have been claimed."""

    waiting: int  # jobs with a turn above 0
    first: int  # jobs with turn 0
    level: int  # jobs in progress
    served: tuple[bool, float]  # when last served; greater is later
    turn: int  # turn of the first of `waiting`; unique among owners

    def before(self, level: int, rank: tuple[int, tuple[bool, float], int]) -> int:
        """Return how many of `waiting` come before a job of another owner."""
        n = level - self.level
        below = min(max(n, 0), self.waiting)
        return below + (0 <= n < self.waiting and (n, self.served, self.turn) < rank)


def position(connection: Connection, row: TableRow) -> int:
    """Return 1 for the waiting job that is next, 2 for the one after it, and so on; 0 for one that waits for jobs."""
    if wait_rows.are_there(connection, row.id):
        return 0
    if row.turn == 0:
        ahead = select(func.count()).where(_WAITS, _T.turn == 0, _T.seq < row.seq)
        return connection.execute(ahead).scalar_one() + 1
    owners = _owners(connection)
    own = owners.pop(row.owner)
    earlier = select(func.count()).where(_WAITS, _T.owner == row.owner, _T.turn > 0, _T.turn < row.turn)
    n = connection.execute(earlier).scalar_one()
    rank = (n, own.served, own.turn)
    others = sum(owner.first + owner.before(own.level + n, rank) for owner in owners.values())
    return own.first + n + others + 1


def first_waiting(connection: Connection, owner: str | None, limit: int) -> tuple[list[TableRow], int]:
    """Return the first waiting jobs of an owner in the order of the queue, and how many wait in all.

    Jobs that wait for other jobs are among them.

    Args:
        connection: A connection inside a transaction.
        owner: The owner; None for all owners, whose jobs come in the order in which they began to wait.
        limit: The largest number of jobs.
    """
    scheduled = _T.state == JobState.SCHEDULED.value
    own = scheduled if owner is None else and_(scheduled, belongs_to(owner))
    rows = connection.execute(select(jobs_table).where(own).order_by(_T.turn, _T.seq).limit(limit)).all()
    return list(rows), connection.execute(select(func.count()).where(own)).scalar_one()


def pick(
    connection: Connection,
    devices: Sequence[str] | None,
    limits: LimitsConfig = owner_limits.NONE,
    but: str | None = None,
) -> ClaimChoice:
    """Choose the first job in the order that fits.

    Args:
        connection: A connection inside a transaction. To claim the job, the transaction must hold the supervisor's row.
        devices: All devices that may be assigned; None if none are known, and then none are assigned.
        limits: What each owner may use; jobs of owners at a limit are passed over, and no device is kept for them.
        but: A recipe whose jobs' devices count as free; None for no recipe.
    """
    count = len(devices or ())
    taken: set[str] = set()
    holding = and_(_RUNS, _T.devices.is_not(None), true() if but is None else _T.recipe != but)
    for held in connection.execute(select(_T.devices).where(holding)).scalars():
        taken.update(held.split(","))
    free = [device for device in devices or () if device not in taken]
    kept: TableRow | None = None
    blocked = False
    held = owner_limits.held(connection, limits)
    for row in _candidates(connection, count):
        need = min(1, count) if row.gpus is None else row.gpus
        if row.owner in held.all or (need > 0 and row.owner in held.on_gpus):
            continue
        if need == 0:
            unknown = row.gpus is None and devices is None
            return ClaimChoice(row, None if unknown else "", kept)
        if need <= len(free) and not blocked:
            return ClaimChoice(row, ",".join(free[:need]), None)
        if not blocked and row.turn > 0:
            kept = row
        blocked = True
    return ClaimChoice(None, None, kept)


def _candidates(connection: Connection, count: int) -> list[TableRow]:
    """Return, in order, every job with turn 0, then each owner's first job and first job that needs no device."""
    may_start = trial_rows.not_in(trial_rows.full_sweeps(connection))
    possible = and_(or_(_T.gpus.is_(None), _T.gpus <= count), may_start)
    needs_none = and_(_T.gpus == 0, may_start) if count else possible
    first = connection.execute(select(jobs_table).where(_WAITS, _T.turn == 0, possible).order_by(_T.seq)).all()
    heads = connection.execute(
        select(jobs_table).where(_WAITS, or_(_T.turn.in_(_lowest(possible)), _T.turn.in_(_lowest(needs_none))))
    ).all()
    if not heads:
        return list(first)
    owners = _owners(connection)

    def order(row: TableRow) -> tuple[int, tuple[bool, float], int]:
        owner = owners[row.owner]
        return (owner.level, owner.served, row.turn)

    # Each query of a claim sees new commits: an owner whose last job was just cancelled is missing here.
    return [*first, *sorted((row for row in heads if row.owner in owners), key=order)]


def _lowest(condition: ColumnElement[bool]) -> Select[tuple[int]]:
    return select(func.min(_T.turn)).where(_WAITS, _T.turn > 0, condition).group_by(_T.owner)


def _owners(connection: Connection) -> dict[str, _Owner]:
    """Return every owner who has a waiting job."""
    counts = select(_T.owner, func.count().label("jobs")).where(_RUNS).group_by(_T.owner)
    running: dict[str, int] = {row.owner: row.jobs for row in connection.execute(counts)}
    every = jobs_table.alias()
    served = select(func.max(every.c.started_at)).where(every.c.owner == _T.owner).scalar_subquery()
    waiting = select(
        _T.owner,
        func.count().label("jobs"),
        func.count(case((_T.turn == 0, 1))).label("first"),
        func.max(case((_T.turn == 0, _T.seq))).label("last_first"),
        func.min(case((_T.turn > 0, _T.turn))).label("turn"),
        served.label("served"),
    )
    owners = {}
    for row in connection.execute(waiting.where(_WAITS).group_by(_T.owner)):
        last = (True, float(row.last_first)) if row.first else (False, row.served.timestamp() if row.served else 0.0)
        owners[row.owner] = _Owner(
            waiting=row.jobs - row.first,
            first=row.first,
            level=running.get(row.owner, 0) + row.first,
            served=last,
            turn=row.turn or 0,
        )
    return owners


def next_turn(connection: Connection) -> int:
    """Return the turn for a job that joins the end of its owner's queue."""
    # On PostgreSQL this also waits for a supervisor that is just leaving, see `release_lease`. Call it before a job's
    # row is locked, so that no two transactions wait for each other.
    turns = supervisor_table.c.turns
    turn: int = connection.execute(update(supervisor_table).values(turns=turns + 1).returning(turns)).scalar_one()
    return turn
