"""What the server remembers of a file of events: right after each change of the file, bounded, and read only once."""

import asyncio
import gc
import os
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from llama_stack_provider_moe.control.server import event_index, newest_events, remembered, timeline
from llama_stack_provider_moe.control.server.event_index import EventIndex, index_of, saved_artifacts
from llama_stack_provider_moe.control.server.event_texts import EventTexts
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.remembered import Remembered
from llama_stack_provider_moe.control.server.store_watch import StoreWatch
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.events import (
    Evaluation,
    EventLog,
    Failed,
    Message,
    Resumed,
    Saved,
    Started,
    Step,
)
from tests.support.dashboard_jobs import routing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def step(number: int, **metrics: float) -> Step:
    return Step(step=number, max_steps=100, epoch=0, metrics=metrics or {"loss": 1 / number})


def write(path: Path, *found: Any) -> None:
    """Append events; a number is a step, and a negative one a resumption from that step."""
    log = EventLog(path)
    for each in found:
        if isinstance(each, int):
            log.append(step(each) if each > 0 else Resumed(step=-each, checkpoint="c"))
        else:
            log.append(each)
    log.close()


def steps(path: Path, after: int | None = None) -> list[int]:
    return timeline.metrics("j", path, None, after, 1000).steps


class Bytes:
    """How many bytes the readings of all files read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for kind in (EventIndex, newest_events.NewestEvents):
            monkeypatch.setattr(kind, "read", self._counting(kind.read))

    def _counting(self, real: Any) -> Any:
        def read(reading: Any, file: BinaryIO, start: int, end: int) -> int:
            found: int = real(reading, file, start, end)
            self.count += found - start
            return found

        return read

    def taken(self) -> int:
        found, self.count = self.count, 0
        return found


def test_only_what_is_new_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Bytes(monkeypatch)
    write(path, *range(1, 500))
    assert steps(path) == list(range(1, 500))
    assert read.taken() == path.stat().st_size
    assert steps(path, after=490) == list(range(491, 500))
    assert read.taken() == 0
    before = path.stat().st_size
    write(path, 500, routing(500, random.Random(0), {}))
    assert steps(path)[-1] == 500
    assert read.taken() == path.stat().st_size - before


def test_only_the_lines_that_are_shown_are_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, *range(1, 500))
    parsed: list[bytes] = []
    real = Step.model_validate_json
    monkeypatch.setattr(Step, "model_validate_json", lambda line: parsed.append(line) or real(line))
    assert steps(path, after=497) == [498, 499]
    assert len(parsed) == 2
    assert len(timeline.metrics("j", path, None, None, 7).steps) == 7
    assert len(parsed) == 9


@pytest.mark.parametrize("seed", range(30))
def test_a_look_after_each_change_finds_what_one_look_at_the_end_finds(tmp_path: Path, seed: int) -> None:
    """Writes, halves of lines, resumptions, repeated steps, cuts and replacements in a random order."""
    rng = random.Random(seed)
    path, number = tmp_path / "events.jsonl", 1
    for _ in range(60):
        match rng.randrange(12):
            case 0:
                number = rng.randint(0, number)
                write(path, -number)
                number += 1
            case 1:
                with path.open("ab") as file:  # a disk that got full, or a process that was killed
                    file.write(step(number).model_dump_json().encode()[: rng.randint(1, 80)])
            case 2 if path.exists():
                os.truncate(path, rng.randint(0, path.stat().st_size))
            case 3:
                path.unlink(missing_ok=True)
            case 4:
                path.write_bytes(b"")
                write(path, *range(1, rng.randint(2, 9)))
            case 5:
                other = tmp_path / "other"
                write(other, *range(1, rng.randint(2, 9)))
                other.replace(path)
            case 6:
                number = max(1, number - rng.randint(0, 3))
                write(path, number)
                number += 1
            case _:
                write(path, number, Evaluation(step=number, epoch=0, metrics={"validation_loss": 1}))
                number += 1
        found = timeline.metrics("j", path, None, None, 1000)
        copy = tmp_path / f"copy-{rng.random()}"
        if path.exists():
            copy.write_bytes(path.read_bytes())
        assert found == timeline.metrics("j", copy, None, None, 1000)
        assert dict(newest_events.newest_events(path)) == events.latest(copy)


def test_a_file_that_was_cut_and_grew_beyond_its_old_size_is_read_anew(path: Path) -> None:
    write(path, *range(1, 10))
    assert steps(path) == list(range(1, 10))
    inode = path.stat().st_ino
    os.truncate(path, 0)
    write(path, *range(21, 60))
    assert path.stat().st_ino == inode
    assert steps(path) == list(range(21, 60))


def test_the_seam_is_part_of_the_identity(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of the last bytes, the test before this one would find steps of two files."""
    monkeypatch.setattr(remembered, "SEAM_BYTES", 0)
    write(path, *range(1, 10))
    steps(path)
    os.truncate(path, 0)
    write(path, *range(21, 60))
    assert steps(path) != list(range(21, 60))


def test_the_newest_events_of_a_window_and_of_earlier_looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest_events, "WINDOW_BYTES", 2000)
    write(path, Started(pid=1, versions={}), 1, Failed(reason="lost", error="OSError"))
    assert list(newest_events.newest_events(path)) == ["failed", "step", "started"]
    write(path, *[Message(text="x" * 500)] * 10)
    assert list(newest_events.newest_events(path)) == ["message", "failed", "step", "started"]
    write(path, Started(pid=2, versions={}))
    found = newest_events.newest_events(path)
    assert list(found) == ["started", "message", "step"], "a job that runs again has not failed"
    assert found["started"].pid == 2


def saved(name: str, folder: Path) -> Saved:
    return Saved(artifact={
        "identifier": name, "kind": "checkpoint", "path": str(folder), "created_at": "2026-01-01T00:00:00Z",
        "epoch": 0, "step": 1, "bytes": 1,
    })  # fmt: skip


def test_artifacts_that_exist(path: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(path, saved("j/a", tmp_path / "a"), saved("j/b", tmp_path / "b"), Saved(artifact={"identifier": "bad"}))
    assert [each.identifier for each in saved_artifacts(path)] == ["j/a", "j/b"]
    (tmp_path / "a").rmdir()  # pruned
    write(path, saved("j/b", tmp_path))
    assert [(each.identifier, each.path) for each in saved_artifacts(path)] == [("j/b", str(tmp_path))]
    assert saved_artifacts(tmp_path / "missing") == ()


def test_memory_is_bounded(tmp_path: Path) -> None:
    kept: Remembered[EventIndex] = Remembered(EventIndex, 3, 30 * 24)
    made: list[EventIndex] = []

    def look(name: str) -> EventIndex:
        with kept.of(tmp_path / name) as (index, _):
            made.append(index)  # so that another one can't have its identity
            return index

    for name, count in (("a", 10), ("b", 10), ("c", 5), ("d", 100)):
        write(tmp_path / name, *range(1, count))
    first = [look(name) for name in ("a", "b", "c")]
    assert [look(name) for name in ("a", "b", "c")] == first
    assert look("a") is first[0]
    large = look("d")
    assert look("d") is large, "one that is larger than the limit is kept alone"
    assert [look(name) in first for name in ("a", "b", "c")] == [False, False, False]
    for number in range(5):
        write(tmp_path / f"f{number}", 1)
        look(f"f{number}")
    assert len(kept._known) == 3


def test_a_step_needs_24_bytes(path: Path) -> None:
    write(path, *range(1, 1001), *[routing(1000, random.Random(0), {})] * 3)
    with index_of(path) as (index, position):
        assert (index.size_bytes, position) == (1002 * 24, path.stat().st_size), "and the table of one step"


def test_followers_parse_each_event_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    real = timeline.event_of
    monkeypatch.setattr(timeline, "event_of", lambda line, types: parsed.append(line) or real(line, types))
    texts, wanted = EventTexts(), frozenset({"step"})
    write(path, *range(1, 150), Message(text='"type":"step"'))
    cursors = [0] * 20
    for number in range(150, 190):
        write(path, number)
        follower = number % 20  # each looks at another moment, and gets another page
        cursors[follower] = texts.page(path, cursors[follower], wanted).position
    for cursor in cursors:
        found = texts.page(path, cursor, wanted)
        assert found.position == path.stat().st_size
    assert len([line for line in parsed if b'"step":9,' in line]) == 1
    assert len([line for line in parsed if b'"step":188,' in line]) == 1
    assert texts.page(path, found.position, wanted) == (None, found.position)


def test_texts_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_stack_provider_moe.control.server.event_texts.MOST_BYTES", 5000)
    texts = EventTexts()
    write(path, *range(1, 200))
    assert texts.page(path, 0, frozenset()).text is not None
    assert texts._size_bytes == sum(len(line) + len(text) for line, text in texts._texts.items()) <= 5000
    assert len(texts._texts) > 5


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Each first reading waits for this."""
    begin = threading.Event()
    real = EventIndex.read

    def read(reading: EventIndex, file: BinaryIO, start: int, end: int) -> int:
        begin.wait(20)
        return real(reading, file, start, end)

    monkeypatch.setattr(EventIndex, "read", read)
    yield begin
    begin.set()


def test_concurrent_looks_share_one_reader(path: Path, slow: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Bytes(monkeypatch)
    write(path, *range(1, 300))
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(steps(path))) for _ in range(8)]
    for each in threads:
        each.start()
    slow.set()
    for each in threads:
        each.join(20)
    assert found == [list(range(1, 300))] * 8
    assert read.taken() == path.stat().st_size


def test_a_line_that_was_cut_hides_no_earlier_step(path: Path) -> None:
    write(path, *range(1, 6))
    line = step(2).model_dump_json().encode()
    with path.open("ab") as file:
        file.write(line[: line.index(b'"max_steps"')] + b"\n")
    assert steps(path) == [1, 2, 3, 4, 5]
    assert event_index.MOST_BYTES > 24 * 50_000 * 2


@pytest.mark.parametrize("kind", ["run", "within"])
def test_an_error_that_nobody_waits_for_is_not_logged_by_the_event_loop(kind: str) -> None:
    """A host's logger renders such an error with all locals, for 3 seconds on the event loop."""
    told: list[dict[str, Any]] = []
    leaves, pool = threading.Event(), Pool("calls", 1, 1, "calls")
    watch = StoreWatch(lambda: True)

    def fails() -> None:
        leaves.wait(20)
        raise ZeroDivisionError

    async def abandon() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        call = watch.run(fails) if kind == "run" else pool.within(20, "too long", fails)
        request = asyncio.ensure_future(call)
        await asyncio.sleep(0.05)
        request.cancel()  # as when a client leaves its stream
        with suppress(asyncio.CancelledError):
            await request
        leaves.set()
        await asyncio.sleep(0.1)
        del request, call
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(abandon())
    assert told == []
    watch.close()
    pool.close()
