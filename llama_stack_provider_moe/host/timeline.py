"""A job's events as pages, and its metrics as series; in bounded memory, whatever the size of the file.

A file may hold steps that were undone: a process is lost at step 30, and the next one goes on from the checkpoint of
step 20, with a `resumed` event. Its steps from 21 on are the job's; those before it are not shown.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from llama_stack_provider_moe.host import wire
from llama_stack_provider_moe.jobs.events import Evaluation, Event, Resumed, Step

WINDOW_BYTES = 4 << 20  # of one page of events; a page has at least one event, or counts one unreadable line
# Longer than any event; a file that is one endless line is read in pieces, none of which is an event.
LINE_LIMIT_BYTES = 4 << 20
_EVENT: TypeAdapter[Any] = TypeAdapter(Event)


def page(job_id: str, path: Path, cursor: int, limit: int) -> wire.Events:
    """Up to `limit` events from byte `cursor` on, as they stand in the file; a missing file has none.

    A line that is no event (a disk that filled up in the middle of a write) is counted and passed over.
    """
    events: list[dict[str, Any]] = []
    unreadable, start = 0, cursor
    for line in _lines(path, cursor):
        if len(events) + unreadable == limit or (cursor > start and cursor + len(line) - start > WINDOW_BYTES):
            break
        cursor += len(line)
        try:
            events.append(json.loads(_EVENT.validate_json(line).model_dump_json()))
        except ValueError:
            unreadable += 1
    return wire.Events(job_uuid=job_id, events=events, cursor=cursor, unreadable=unreadable)


def metrics(job_id: str, path: Path, names: set[str] | None, since_step: int | None, limit: int) -> wire.MetricSeries:
    """The metrics of a job's steps, and its evaluations; at most `limit` of each, evenly thinned.

    Args:
        job_id: the job.
        path: its events.
        names: of the metrics to give; None: all.
        since_step: give what came after this step alone; None: everything.
        limit: most points; the first and the last one are always among them.
    """

    def chosen(found: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in found.items() if names is None or name in names}

    after = -1 if since_step is None else since_step
    steps: _Thinned[Step] = _Thinned(limit, after)
    evaluations: _Thinned[Evaluation] = _Thinned(limit, after)
    for event in _standing(path):
        event = event.model_copy(update={"metrics": chosen(event.metrics)})
        if isinstance(event, Step):
            steps.add(event)
        else:
            evaluations.add(event)
    points = steps.points()
    found = dict.fromkeys(name for point in points for name in point.metrics)
    return wire.MetricSeries(
        job_uuid=job_id,
        steps=[point.step for point in points],
        epoch=[point.epoch for point in points],
        metrics={name: [point.metrics.get(name) for point in points] for name in found},
        evaluations=[
            wire.EvaluationPoint(step=each.step, epoch=each.epoch, metrics=dict(each.metrics))
            for each in evaluations.points()
        ],
    )


class _Undone(NamedTuple):
    """What a `resumed` event says: of the lines before byte `before`, those of steps beyond `step` don't count."""

    before: int
    step: int


def _standing(path: Path) -> Iterator[Step | Evaluation]:
    """Steps and evaluations that no later `resumed` event has undone."""
    undone = _undone(path)
    offset = 0
    for line in _lines(path):
        offset += len(line)
        while undone and undone[0].before < offset:
            undone.pop(0)
        event = _read(line, Step) or _read(line, Evaluation)
        # Each bound is the least of its own and all later ones, so the next one speaks for all.
        if event is not None and (not undone or event.step <= undone[0].step):
            yield event


def _undone(path: Path) -> list[_Undone]:
    found, offset = [], 0
    for line in _lines(path):
        event = _read(line, Resumed)
        if event is not None:
            found.append(_Undone(offset, event.step))
        offset += len(line)
    lowest = None
    for index in range(len(found) - 1, -1, -1):
        lowest = found[index].step if lowest is None else min(lowest, found[index].step)
        found[index] = found[index]._replace(step=lowest)
    return found


def _read[E: (Step, Evaluation, Resumed)](line: bytes, kind: type[E]) -> E | None:
    # Written by pydantic, which puts no space here; inside a text the quotes would be escaped. Most lines of a
    # Mixture-of-Experts job are routing tables, which this passes over unparsed.
    if f'"type":"{kind.model_fields["type"].default}"'.encode() not in line:
        return None
    try:
        return kind.model_validate_json(line)
    except ValueError:
        return None


def _lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Whole lines from byte `start` on, with their ends; the last one may still be being written, and is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        if start >= file.seek(0, 2):  # a place that no file reaches is none to seek to
            return
        file.seek(start)
        while line := file.readline(LINE_LIMIT_BYTES):
            if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES:
                return
            yield line


@dataclass
class _Thinned[E: (Step, Evaluation)]:
    """At most `limit` of the points after step `after`, spread evenly over the steps; holds no more than twice as many.

    Steps are put into buckets of equal width, of which each keeps its first point; when there are too many buckets,
    their width doubles. A step that comes again (a process that began anew) replaces what stood there and after it.
    """

    limit: int
    after: int
    _width: int = 1
    _kept: list[E] = field(default_factory=list)
    _last: E | None = None

    def add(self, point: E) -> None:
        """The next point of the file."""
        while self._kept and self._kept[-1].step >= point.step:
            self._kept.pop()
        if point.step <= self.after:
            self._last = None
            return
        self._last = point
        if self._kept and self._bucket(self._kept[-1]) == self._bucket(point):
            return
        self._kept.append(point)
        while len(self._kept) > 2 * self.limit:
            self._width *= 2
            self._kept = _first_of_each(self._kept, self._bucket)

    def points(self) -> list[E]:
        """What is left, in the order of steps."""
        if self._last is None:
            return []
        points = list(self._kept)
        if points[-1].step != self._last.step:
            points.append(self._last)
        if len(points) <= self.limit:
            return points
        if self.limit == 1:
            return points[-1:]
        gaps = self.limit - 1
        return [points[round(index * (len(points) - 1) / gaps)] for index in range(self.limit)]

    def _bucket(self, point: E) -> int:
        return point.step // self._width


def _first_of_each[E: (Step, Evaluation)](points: list[E], key: Callable[[E], int]) -> list[E]:
    firsts: dict[int, E] = {}
    for point in points:
        firsts.setdefault(key(point), point)
    return list(firsts.values())
