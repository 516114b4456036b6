"""A job's events as pages, and its metrics as series, in bounded memory whatever the size of the file."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.server import wire
from llama_stack_provider_moe.control.server.event_index import events_at, index_of
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import Evaluation, Step, parse

WINDOW_BYTES = 4 << 20  # size of one page of events; a page has at least one event or one unreadable line
# Longer than any event. A longer line is read in pieces, and none of them is an event.
LINE_LIMIT_BYTES = 4 << 20


class Cut[T](NamedTuple):
    """A part of a file of events.

    Attributes:
        events: the events of it.
        cursor: the byte after it.
        unreadable: lines that are not events.
    """

    events: list[T]
    cursor: int
    unreadable: int


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
    found = cut(path, cursor, limit, types, event_of)
    return wire.Events(job_uuid=job_id, events=found.events, cursor=found.cursor, unreadable=found.unreadable)


def cut[T](
    path: Path, cursor: int, limit: int, types: frozenset[str], convert: Callable[[bytes, frozenset[str]], T | None]
) -> Cut[T]:
    """Return what `convert` makes of a page of lines, see `page`.

    Args:
        path: the file with a job's events.
        cursor: the byte to start at.
        limit: largest number of events.
        types: types of the events; none: any.
        convert: makes something of a line that may have one of these types; None where it has another. Raises
            ValueError where the line is not an event.
    """
    events: list[T] = []
    unreadable, start = 0, cursor
    needles = [f'"type":"{name}"'.encode() for name in types]
    for line in lines(path, cursor):
        if len(events) + unreadable == limit or (cursor > start and cursor + len(line) - start > WINDOW_BYTES):
            break
        cursor += len(line)
        if needles and not any(needle in line for needle in needles):
            continue
        try:
            event = convert(line, types)
        except ValueError:
            unreadable += 1
            continue
        if event is not None:
            events.append(event)
    return Cut(events, cursor, unreadable)


def event_of(line: bytes, types: frozenset[str]) -> wire.JsonObject | None:
    """Return the event of a line; None if it has none of the types, but quotes an event of them in a text.

    Raises:
        ValueError: the line is not an event.
    """
    event = parse(line)
    if types and event.type not in types:
        return None
    # NaN and infinity become text, because JSON lacks them; a later version may write events with such values.
    found: wire.JsonObject = json.loads(event.model_dump_json(), parse_constant=str)
    return found


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

    after = -1 if since_step is None else since_step
    with index_of(path) as (index, cursor):
        steps, evaluations = index.steps.thinned(after, limit), index.evaluations.thinned(after, limit)
    points = [(event, chosen(event.metrics)) for event in events_at(path, steps, Step)]
    found = dict.fromkeys(name for _, figures in points for name in figures)
    return wire.MetricSeries(
        job_uuid=job_id,
        steps=[event.step for event, _ in points],
        epoch=[event.epoch for event, _ in points],
        metrics={name: [figures.get(name) for _, figures in points] for name in found},
        evaluations=[
            wire.EvaluationPoint(step=each.step, epoch=each.epoch, metrics=dict(chosen(each.metrics)))
            for each in events_at(path, evaluations, Evaluation)
        ],
        cursor=cursor,
    )


def total(path: Path, name: str) -> float | None:
    """Return the sum of a metric over a job's steps; None if no step has it."""
    with index_of(path) as (index, _):
        steps = index.steps.thinned(-1, len(index.steps))
    found = [event.metrics[name] for event in events_at(path, steps, Step) if name in event.metrics]
    return math.fsum(found) if found else None


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
