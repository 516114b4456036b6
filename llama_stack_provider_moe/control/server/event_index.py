"""Where the events of a job are in its file: one pass finds the places, without parsing steps and routing tables.

The file may contain undone steps: a process is lost at step 30, and the next one resumes from the checkpoint of step 20
with a `resumed` event. Then the new steps from 21 on count, and the old steps 21 to 30 are hidden.

A long job of a large model has a gigabyte of events; this module keeps 24 bytes for each step and each routing event,
and as many for each table.
"""

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import BaseModel

from llama_stack_provider_moe.control.server.remembered import Remembered
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import LINE_LIMIT_BYTES, Saved
from llama_stack_provider_moe.jobdir.folder import Artifact

MOST_FILES = 512
MOST_BYTES = 128 << 20
BUFFER_BYTES = 1 << 20
# Our own writer begins every line so. Inside a text, the quotes would be escaped.
_HEAD = re.compile(
    rb'\s*\{\s*"time"\s*:\s*"[^"]{1,64}"\s*,\s*"type"\s*:\s*"(?:(step|evaluation|routing|resumed)"\s*,\s*"step"\s*:\s*'
    rb'(\d{1,18})\s*[,}]|(saved)")'
)
# A `routing` event without tables has only figures of its step.
_WITHOUT_TABLES = re.compile(rb'\s*"layers"\s*:\s*\[\s*\]')


class Place(NamedTuple):
    """Where a line is: the byte that it begins at, and its length."""

    start: int
    length: int


class Places:
    """The lines of one type of events, by their steps, which ascend."""

    def __init__(self) -> None:
        self._steps, self._starts, self._lengths = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, place: Place) -> None:
        """Add a line; a repeated step replaces the old one and all after it."""
        self.undo(step - 1)
        self._steps.append(step)
        self._starts.append(place.start)
        self._lengths.append(place.length)

    def undo(self, step: int) -> None:
        """Remove the lines of later steps."""
        kept = bisect_right(self._steps, step)
        for column in (self._steps, self._starts, self._lengths):
            del column[kept:]

    def thinned(self, after: int, limit: int) -> list[Place]:
        """Return at most `limit` of the lines after step `after`, evenly spread; the first and the last are among them.

        With a `limit` of 1, that is the last one.
        """
        begin, end = bisect_right(self._steps, after), len(self._steps)
        count = end - begin
        if count <= limit:
            chosen: Iterable[int] = range(begin, end)
        elif limit == 1:
            chosen = (end - 1,)
        else:
            chosen = (begin + round(index * (count - 1) / (limit - 1)) for index in range(limit))
        return [Place(self._starts[index], self._lengths[index]) for index in chosen]

    def newest(self, count: int) -> list[Place]:
        """Return the lines of the last steps, the newest first."""
        first = max(0, len(self._steps) - count)
        return [Place(self._starts[index], self._lengths[index]) for index in reversed(range(first, len(self._steps)))]

    @property
    def size_bytes(self) -> int:
        """Memory of the columns."""
        return sum(column.itemsize * len(column) for column in (self._steps, self._starts, self._lengths))


class EventIndex:
    """The places of one file, and the artifacts that it names.

    Attributes:
        steps, evaluations, routing: the lines of these events that no resumption has undone.
        tables: those lines of `routing` that have tables of all experts.
        saved: the artifacts by identifier, oldest first.
    """

    def __init__(self) -> None:
        self.steps, self.evaluations, self.routing, self.tables = Places(), Places(), Places(), Places()
        self.saved: dict[str, Artifact] = {}
        self._saved_bytes = 0
        self._by_type = {b"step": self.steps, b"evaluation": self.evaluations, b"routing": self.routing}

    def read(self, file: BinaryIO, start: int, end: int) -> int:
        """Read whole lines between two bytes of the file, and return the byte after the last one."""
        if start == end:
            return start
        with open(file.fileno(), "rb", BUFFER_BYTES, closefd=False) as buffered:
            buffered.seek(start)
            while start < end and (line := buffered.readline(LINE_LIMIT_BYTES)):
                if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES:
                    break
                self._add(line, start)
                start += len(line)
        return start

    def _add(self, line: bytes, start: int) -> None:
        head = _HEAD.match(line)
        if head is None or not line[-8:].rstrip().endswith(b"}"):  # another type, or a line that a full disk cut
            return
        kind, step = head[1], head[2]
        if kind is None:
            self._add_saved(line)
        elif kind == b"resumed":
            for places in (*self._by_type.values(), self.tables):
                places.undo(int(step))
        else:
            self._by_type[kind].add(int(step), Place(start, len(line)))
        if kind == b"routing":
            self.tables.undo(int(step) - 1)
            if not _WITHOUT_TABLES.match(line, head.end()):
                self.tables.add(int(step), Place(start, len(line)))

    def _add_saved(self, line: bytes) -> None:
        try:
            artifact = Artifact.model_validate(Saved.model_validate_json(line).artifact, extra="ignore")
        except ValueError:  # the process died while it wrote the event
            return
        self.saved[artifact.identifier] = artifact
        self._saved_bytes += 4 * len(line)

    @property
    def size_bytes(self) -> int:
        """About how much memory this needs."""
        return self._saved_bytes + sum(places.size_bytes for places in (*self._by_type.values(), self.tables))


_remembered = Remembered(EventIndex, MOST_FILES, MOST_BYTES)


def index_of(path: Path) -> "AbstractContextManager[tuple[EventIndex, int]]":
    """Return a context with the index of a file of events, and the byte that it reaches; see `Remembered.of`."""
    return _remembered.of(path)


def saved_artifacts(path: Path) -> tuple[Artifact, ...]:
    """Return the artifacts that a job has saved and that still exist, oldest first; each name only once."""
    with index_of(path) as (index, _):
        found = list(index.saved.values())
    return tuple(artifact for artifact in found if Path(artifact.path).is_dir())  # old checkpoints may be pruned


def events_at[E: BaseModel](path: Path, places: Iterable[Place], kind: type[E]) -> Iterator[E]:
    """Yield the events at these places; a line that is not such an event is left out, for instance damage."""
    for _, event in placed_events(path, places, kind):
        yield event


def placed_events[E: BaseModel](path: Path, places: Iterable[Place], kind: type[E]) -> Iterator[tuple[Place, E]]:
    """Yield each of `events_at` with its place."""
    try:
        file = open_regular(path)
    except FileNotFoundError:  # the job was deleted meanwhile
        return
    with file:
        for place in places:
            try:
                yield place, kind.model_validate_json(os.pread(file.fileno(), place.length, place.start))
            except ValueError:
                continue
