"""Which job is next: fair between owners, first come first served within an owner.

The order is the one in which jobs would be claimed if none ended meanwhile:

1. Jobs whose turn is 0, by submission: their process was lost, or devices are kept for them.
2. Then always the owner with the fewest jobs in progress; of equal ones, the one served longest ago; of those, the one
   whose job waits longest. Of that owner, the job with the lowest turn. Each claim is one more in progress for him.

A job that needs more devices than are free waits, and is not overtaken for ever: the first such job gets turn 0, and
from then on free devices are kept for it. Jobs that need none may go ahead, for they take nothing that it waits for.

Step 2 needs no simulation. With c jobs in progress, the n-th waiting job (from 0) of an owner is claimed when he has
c + n: jobs go by that level; within a level, those come first whose owners were served longest ago, and an owner who
was served within the simulation (n > 0) was so later than those who were not, by as many rounds as n says.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, case, func, or_, select

from llama_stack_provider_moe.jobs.schema import jobs_table
from llama_stack_provider_moe.jobs.state import JobState

_T = jobs_table.c
_WAITS = _T.state == JobState.SCHEDULED.value
_RUNS = _T.state == JobState.IN_PROGRESS.value


class Choice(NamedTuple):
    """What a claim does: take `job` and give it `devices`; keep free devices for the job `kept` from now on."""

    job: Row[Any] | None
    devices: str | None
    kept: Row[Any] | None


NOTHING = Choice(None, None, None)


class _Owner(NamedTuple):
    """One owner's part of the queue, as it is once the jobs with turn 0 have been claimed."""

    waiting: int  # jobs with a turn of their own
    first: int  # jobs with turn 0
    level: int  # jobs in progress
    served: tuple[bool, float]  # greater: later
    turn: int  # of the first of `waiting`; no two owners' are equal

    def before(self, level: int, rank: tuple[int, tuple[bool, float], int]) -> int:
        """How many of `waiting` come before a job of another owner."""
        n = level - self.level
        below = min(max(n, 0), self.waiting)
        return below + (0 <= n < self.waiting and (n, self.served, self.turn) < rank)


def position(connection: Connection, row: Row[Any]) -> int:
    """1 for the waiting job that is next, 2 for the one after it."""
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


def pick(connection: Connection, devices: Sequence[str] | None) -> Choice:
    """The first job in the order that fits.

    Args:
        connection: inside a transaction; one that goes on to claim must hold the supervisor's row.
        devices: all that are given out; None: nobody knows of any, and none are.
    """
    count = len(devices or ())
    taken: set[str] = set()
    for held in connection.execute(select(_T.devices).where(_RUNS, _T.devices.is_not(None))).scalars():
        taken.update(held.split(","))
    free = [device for device in devices or () if device not in taken]
    kept: Row[Any] | None = None
    blocked = False
    for row in _candidates(connection, count):
        need = min(1, count) if row.gpus is None else row.gpus
        if need == 0:
            unknown = row.gpus is None and devices is None
            return Choice(row, None if unknown else "", kept)
        if need <= len(free) and not blocked:
            return Choice(row, ",".join(free[:need]), None)
        if not blocked and row.turn > 0:
            kept = row
        blocked = True
    return Choice(None, None, kept)


def _candidates(connection: Connection, count: int) -> list[Row[Any]]:
    """Every job with turn 0; then of each owner the first job, and the first that needs no device. In order."""
    possible = or_(_T.gpus.is_(None), _T.gpus <= count)
    needs_none = _T.gpus == 0 if count else possible
    first = connection.execute(select(jobs_table).where(_WAITS, _T.turn == 0, possible).order_by(_T.seq)).all()
    heads = connection.execute(
        select(jobs_table).where(_WAITS, or_(_T.turn.in_(_lowest(possible)), _T.turn.in_(_lowest(needs_none))))
    ).all()
    if not heads:
        return list(first)
    owners = _owners(connection)

    def order(row: Row[Any]) -> tuple[int, tuple[bool, float], int]:
        owner = owners[row.owner]
        return (owner.level, owner.served, row.turn)

    # A claim's queries see what was committed in between: who has just cancelled his last job is no longer an owner.
    return [*first, *sorted((row for row in heads if row.owner in owners), key=order)]


def _lowest(condition: ColumnElement[bool]) -> Select[tuple[int]]:
    return select(func.min(_T.turn)).where(_WAITS, _T.turn > 0, condition).group_by(_T.owner)


def _owners(connection: Connection) -> dict[str, _Owner]:
    """Every owner who has a job waiting."""
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
