"""Progress of the current work, reported by the code that does the work.

The watchdog stops a job that is silent for `supervisor.stall_s`. So each long stage of a job reports after each batch,
row, tensor or file. No timer and no thread reports on its behalf: work that hangs is silent.

    with liveness.stage("tokenising", total=1000, unit="rows") as counter:
        for row in rows:
            ...
            counter.advance()

Outside `reports_to` nothing listens, and nothing is reported.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

# A stage reports its beginning and its end, and between them at most once in this many seconds.
EVERY_S = 10.0


class Work(NamedTuple):
    """The progress of a stage.

    Attributes:
        stage: Name of the stage, for the user.
        done: Number of finished units.
        total: Total number of units; None if unknown.
        unit: Name of the unit, in the plural.
    """

    stage: str
    done: int
    total: int | None
    unit: str


Tell = Callable[[Work], None]


class Counter:
    """Counts the progress of one stage."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.reported: Work | None = None

    def advance(self, count: int = 1) -> None:
        """Record that `count` more units are done."""
        self.at(self.work.done + count)

    def at(self, done: int, total: int | None = None, stage: str | None = None) -> None:
        """Record that `done` units are done; `total` and `stage` replace earlier values."""
        renamed = stage is not None and stage != self.work.stage
        before = self.work
        self.work = Work(stage or before.stage, done, before.total if total is None else total, before.unit)
        if _stages and _stages[-1] is self:
            _report(self, at_once=renamed)

    def relay(self, work: Work) -> None:
        """Report another process's progress in place of this stage."""
        renamed = work.stage != self.work.stage
        self.work = work
        if _stages and _stages[-1] is self:
            _report(self, at_once=renamed)


_stages: list[Counter] = []  # running stages, the innermost last
_tell: Tell | None = None
_reported_s = 0.0  # time.monotonic() of the last report


@contextmanager
def reports_to(tell: Tell) -> Iterator[None]:
    """Send every report inside the block to `tell`."""
    global _tell
    before, outer = _tell, _stages[:]
    _tell = tell
    _stages.clear()
    try:
        yield
    finally:
        _tell = before
        _stages[:] = outer


@contextmanager
def stage(name: str, total: int | None = None, unit: str = "steps") -> Iterator[Counter]:
    """Run the block as a stage of the job. An inner stage is reported in its place.

    Args:
        name: Name of the stage, such as `loading weights`.
        total: Total number of units; None if unknown.
        unit: Name of the unit, in the plural.
    """
    counter = Counter(Work(name, 0, total, unit))
    if _tell is None:  # for example in a server, whose threads verify checkpoints of several jobs at once
        yield counter
        return
    _stages.append(counter)
    try:
        _report(counter, at_once=True)
        yield counter
        if counter.reported != counter.work:
            _report(counter, at_once=True)
    finally:
        if counter in _stages:  # an outer stage may have ended first, if a `counted` generator is collected late
            del _stages[_stages.index(counter) :]
    if _stages:
        _report(_stages[-1], at_once=True)


def counted[T](name: str, items: Iterable[T], total: int | None = None, unit: str = "steps") -> Iterator[T]:
    """Yield the items as a stage; each finished item counts as one unit.

    Args:
        name: Name of the stage.
        items: The items.
        total: Number of items; None if unknown.
        unit: Name of the unit, in the plural.
    """
    with stage(name, total, unit) as counter:
        for item in items:
            yield item
            counter.advance()


def alive() -> None:
    """Report that work smaller than the stage's unit was done, such as one layer of a pass over a batch."""
    if _tell is not None and _stages:
        _report(_stages[-1], at_once=False)


def heard() -> None:
    """Record another sign of life, such as the event of an optimiser step."""
    global _reported_s
    _reported_s = time.monotonic()


def _report(counter: Counter, at_once: bool) -> None:
    global _reported_s
    if _tell is None:
        return
    moment = time.monotonic()
    if at_once or moment - _reported_s >= EVERY_S:
        _reported_s = moment
        counter.reported = counter.work
        _tell(counter.work)
