"""A job's events as pages, and its metrics as series, in bounded memory whatever the size of the file.

The file may contain undone steps: a process is lost at step 30, and the next one resumes from the checkpoint of step 20
with a `resumed` event. Then the new steps from 21 on count, and the old steps 21 to 30 are hidden.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import wire
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import Evaluation, Resumed, Step, parse

WINDOW_BYTES = 4 << 20  # size of one page of events; a page has at least one event or one unreadable line
TAIL_BYTES = 64 << 10
# Longer than any event. A longer line is read in pieces, and none of them is an event.
LINE_LIMIT_BYTES = 4 << 20


def page(job_id: str, path: Path, cursor: int, limit: int, types: frozenset[str] = frozenset()) -> wire.Events:
    """Return up to `limit` events from byte `cursor` on, as they are in the file; a missing file has none.

    Lines that are not events (such as one that a full disk cut short) are counted and skipped.

    Args:
        job_id: the job.
        path: the file with its events.
        cursor: the byte to start at.
        limit: largest number of events.
        types: types of the events; none: any. Lines of other types are not parsed.
    """
    events: list[wire.JsonObject] = []
    unreadable, start = 0, cursor
    needles = [f'"type":"{name}"'.encode() for name in types]
    for line in lines(path, cursor):
        if len(events) + unreadable == limit or (cursor > start and cursor + len(line) - start > WINDOW_BYTES):
            break
        cursor += len(line)
        if needles and not any(needle in line for needle in needles):
            continue
        try:
            event = parse(line)
            if types and event.type not in types:  # its text quotes another event
                continue
            # NaN and infinity become text, because JSON lacks them; a later version may write events with such values.
            events.append(json.loads(event.model_dump_json(), parse_constant=str))
        except ValueError:
            unreadable += 1
    return wire.Events(job_uuid=job_id, events=events, cursor=cursor, unreadable=unreadable)


def metrics(job_id: str, path: Path, names: set[str] | None, since_step: int | None, limit: int) -> wire.MetricSeries:
    """Return the metrics of a job's steps, and its evaluations; at most `limit` of each, evenly thinned.

    Args:
        job_id: the job.
        path: the file with its events.
        names: the metrics to return; None for all.
        since_step: return only points after this step; None for all.
        limit: largest number of points; the first and the last one are always included.
    """

    def chosen(found: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in found.items() if names is None or name in names}

    cursor = _complete_bytes(path)  # before the file is read: an event is never missing, but may come twice
    after = -1 if since_step is None else since_step
    steps: _Thinned[Step] = _Thinned(limit, after)
    evaluations: _Thinned[Evaluation] = _Thinned(limit, after)
    for event in _effective(path):
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
        cursor=cursor,
    )


def _complete_bytes(path: Path) -> int:
    """Size of the file up to its last line end."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return 0
    with file:
        end = file.seek(0, 2)
        while end:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def total(path: Path, name: str) -> float | None:
    """Return the sum of a metric over a job's steps; None if no step has it."""
    found = [event.metrics[name] for event in _effective(path) if isinstance(event, Step) and name in event.metrics]
    return math.fsum(found) if found else None


class _Undone(NamedTuple):
    """The effect of a `resumed` event: steps after `step` on lines before byte `before` don't count."""

    before: int
    step: int


def _effective(path: Path) -> Iterator[Step | Evaluation]:
    """The steps and evaluations that no later `resumed` event has undone."""
    undone = _undone(path)
    offset = 0
    for line in lines(path):
        offset += len(line)
        while undone and undone[0].before < offset:
            undone.pop(0)
        event = _read(line, Step) or _read(line, Evaluation)
        # Each bound is the minimum of itself and all later ones, so checking the next one is enough.
        if event is not None and (not undone or event.step <= undone[0].step):
            yield event


def _undone(path: Path) -> list[_Undone]:
    found, offset = [], 0
    for line in lines(path):
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
    # pydantic writes no space here, and inside a string the quotes would be escaped. Most lines of a
    # Mixture-of-Experts job are routing tables, which this check skips without parsing.
    if f'"type":"{kind.model_fields["type"].default}"'.encode() not in line:
        return None
    try:
        return kind.model_validate_json(line)
    except ValueError:
        return None


def lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield complete lines from byte `start` on, with line ends; skips a last line that is still being written."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        if start >= file.seek(0, 2):  # seeking beyond the largest file offset would raise
            return
        file.seek(start)
        while line := file.readline(LINE_LIMIT_BYTES):
            if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES:
                return
            yield line


@dataclass
class _Thinned[E: (Step, Evaluation)]:
    """At most `limit` of the points after step `after`, spread evenly over the steps; stores at most twice as many.

    Steps fall into buckets of equal width, and each bucket keeps its first point; with too many buckets, the width
    doubles. A repeated step (of a process that started again) replaces the old point and all points after it.
    """

    limit: int
    after: int
    _width: int = 1
    _kept: list[E] = field(default_factory=list)
    _last: E | None = None

    def add(self, point: E) -> None:
        """Add the next point of the file."""
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
        """Return the remaining points, in the order of steps."""
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
