"""What a user sees when the disk is full, a file is damaged, or a job prints without end."""

import errno
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import Exit
from llama_stack_provider_moe.control.supervisor.outcome import outcome
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, valid_checkpoints, verify, write_checksums
from llama_stack_provider_moe.jobdir.events import LINE_LIMIT_BYTES, EventLog, Failed, Message, Step, read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.output import bound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import (
    ended,
    fill,
    new_job,
    new_supervisor,
    tiny_config,
)


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig) -> Supervisor:
    return new_supervisor(store, config)


# A full disk.


@pytest.mark.parametrize("store_is", ["on another disk", "on the full disk"])
def test_a_full_disk_fails_the_job_and_keeps_its_checkpoint_and_the_next_one_runs(
    root: Path, small: Path, store_is: str
) -> None:
    config = tiny_config(small, idle_exit_s=0)
    if store_is == "on another disk":
        config = config.model_copy(update={"store_url": f"sqlite:///{root}/jobs.db"})
    store = JobStore(config.url)
    folder = new_job(store, config, "fills", fill_disk=True)
    new_job(store, config, "next")
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    assert supervisor.run()
    job = store.get("fills", None)
    assert (job.state, job.attempts) == (JobState.FAILED, 1), "it would do the same again"
    assert re.match(
        r"the disk is full \(/.*: \d+ bytes are free\); everything saved before is intact: free", job.reason
    )
    assert [artifact.identifier for artifact in job.artifacts] == ["fills/checkpoint-1"]
    assert (Path(job.artifacts[0].path) / "weights").read_bytes() == b"weights"
    assert [path.name for path in (folder / "artifacts").iterdir()] == ["checkpoint-1"], "what has filled it is gone"
    assert store.get("next", None).state is JobState.COMPLETED
    (folder / "child.json").write_text("{}")
    store.resume("fills", None)
    assert ended(store, supervisor, "fills").state is JobState.COMPLETED
    store.close()


def test_how_a_process_ended_is_seen_in_the_light_of_a_full_disk(root: Path, small: Path, store: JobStore) -> None:
    config = tiny_config(small)
    folder = JobFolder(new_job(store, config, "job"))
    store.claim("me")
    job = store.launched("job", 1, 1.0)
    ballast = fill(small)
    killed = outcome(job, Exit(-9), 3)
    ballast.unlink()
    assert killed.state is JobState.FAILED
    assert str(killed.reason).startswith("the disk is full")
    assert "was killed by SIGKILL; it printed nothing" in str(killed.reason)
    assert outcome(job, Exit(-9), 3).state is JobState.SCHEDULED, "with room, it is lost and tried again"
    log = EventLog(folder.events)
    log.append(Failed(reason="RuntimeError: file write failed", error="RuntimeError"))
    log.close()
    ballast = fill(small)
    reason = str(outcome(job, Exit(1), 3).reason)
    assert reason.startswith("the disk is full")
    assert reason.endswith("; RuntimeError: file write failed")
    cancelled = store.request_cancel("job", None)
    assert outcome(cancelled, Exit(1), 3).state is JobState.CANCELLED
    ballast.unlink()
    assert disk.full(small) is None


def test_a_full_disk_cuts_no_event_in_two(small: Path) -> None:
    path = small / "events.jsonl"
    log = EventLog(path)
    fill(small)
    written = 0

    def go_on() -> NoReturn:
        nonlocal written
        while True:
            log.append(Message(text="x" * 1000))
            written += 1

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        go_on()
    page = read(path)
    assert (len(page.events), page.unreadable, page.cursor) == (written, 0, path.stat().st_size)
    (small / "ballast").unlink()
    log.append(Message(text="there is room again"))
    log.close()
    assert [event.text for event in read(path, page.cursor).events] == ["there is room again"]


@pytest.mark.parametrize("is_full", [True, False])
def test_a_store_that_fails_is_given_up_but_a_full_disk_is_waited_out(
    root: Path, small: Path, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(small, idle_exit_s=0).model_copy(update={"store_url": f"sqlite:///{root}/jobs.db"})
    store = JobStore(config.url)
    new_job(store, config, "job")
    if is_full:
        fill(small)
    looks = iter(range(5))
    running = store.running

    def failing() -> list[Job]:
        for _ in looks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (small / "ballast").unlink(missing_ok=True)
        return running()

    monkeypatch.setattr(store, "running", failing)
    monkeypatch.setattr("llama_stack_provider_moe.control.supervisor.supervisor.GIVE_UP_S", 0.0)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    assert supervisor.run() == is_full
    assert store.get("job", None).state is (JobState.COMPLETED if is_full else JobState.SCHEDULED)
    store.close()


def test_an_end_that_the_store_could_not_take_is_not_forgotten(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent gets the exit code only once, and it decides whether a job is tried again."""
    config = tiny_config(root, idle_exit_s=0)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    new_job(store, config, "job", end=3)
    move, failures = store.move, iter(range(3))

    def failing(*arguments: object) -> Job:
        for _ in failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "move", failing)
    assert supervisor.run()
    job = store.get("job", None)
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert "ended with exit code 3" in str(job.reason)


# Damaged files.

STEP = b'{"time":"2026-01-02T03:04:05%s","type":"step","step":%s,"max_steps":2,"epoch":1,"metrics":{}}\n'
DAMAGE = {
    "a line of garbage": (b"garbage\n", 1),
    "half an event": (STEP[:40], 0),
    "binary bytes": (bytes(range(256)) * 40 + b"\n", 41),
    "other JSON": (b'[1, 2]\n{"type":"step"}\n{"type":"no such"}\nnull\n', 4),
    "a number beyond all numbers": (STEP % (b"Z", b"9" * 400), 1),
    "a time of no zone": (STEP % (b"", b"1"), 1),
    "deep nesting": (b"[" * 100_000 + b"\n", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("end", ["manifest", "failed"])
def test_a_damaged_events_file_is_read_around_and_the_job_ends_as_it_would(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, damage: str, end: str
) -> None:
    """Damage the file before what the child writes, and after it."""
    folder = JobFolder(new_job(store, config, "job", end=end))
    content, lines = DAMAGE[damage]
    folder.events.write_bytes(content)
    job = ended(store, supervisor, "job")
    with folder.events.open("ab") as file:
        file.write(content)
    if end == "manifest":
        assert (job.state, len(job.artifacts)) == (JobState.COMPLETED, 1)
    else:
        assert (job.state, job.reason) == (JobState.FAILED, "the rows of this job are too strange")
        assert outcome(job, Exit(1), 3).reason == job.reason
    shown = progress(job, folder)
    assert (shown["stage"], shown["step"], shown["max_steps"], shown["percent"]) == (job.state.value, 2, 2, 100.0)
    page = read(folder.events)
    assert [event.step for event in page.events if event.type == "step"] == [1, 2]
    # The child of these tests does not look at what it appends to: half a line takes its first event along.
    glued = not content.endswith(b"\n")
    assert page.unreadable == 2 * lines + glued
    assert page.cursor == folder.events.stat().st_size - (len(content) if glued else 0), "it may be being written"


def test_half_a_line_of_an_earlier_process_spoils_no_event_of_the_next(root: Path) -> None:
    path = root / "events.jsonl"
    path.write_bytes(STEP % (b"Z", b"1") + STEP[:40])
    log = EventLog(path)
    log.append(Step(step=2, max_steps=2, epoch=1.0, metrics={}))
    log.close()
    page = read(path)
    assert ([event.step for event in page.events], page.unreadable) == ([1, 2], 1)


def test_damage_without_an_end_of_line_is_read_in_pieces(root: Path) -> None:
    path = root / "events.jsonl"
    with path.open("wb") as file:
        file.truncate(16 * LINE_LIMIT_BYTES)
    tracemalloc.start()
    page = read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (page.events, page.unreadable, page.cursor) == ([], 16, 16 * LINE_LIMIT_BYTES)
    assert peak_bytes < 4 * LINE_LIMIT_BYTES


def flipped(path: Path) -> None:
    content = bytearray((path / "adapter.safetensors").read_bytes())
    content[500] ^= 1
    (path / "adapter.safetensors").write_bytes(content)


def linked(path: Path) -> None:
    (path / "adapter.safetensors").rename(path.with_suffix(".moved"))
    (path / "adapter.safetensors").symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flipped, "adapter.safetensors was changed after it was written: its checksum differs"),
        (linked, r"adapter.safetensors has \d+ bytes, 1000 were written"),
        (lambda path: os.truncate(path / "adapter.safetensors", 999), "has 999 bytes, 1000 were written"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json: No such file"),
        (lambda path: (path / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing or can't be read"),
        (lambda path: (path / CHECKSUMS).write_bytes(b"\x00" * 100), f"{CHECKSUMS} is missing or can't be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    root: Path, damage: Callable[[Path], None], why: str
) -> None:
    spec = JOB_SPEC.validate_python({"recipe": "sft", "model": "some/model", "data": {"dataset_id": "rows"}})
    folder = JobFolder(root / "job")
    paths = [folder.checkpoints(spec) / name for name in ("step-30", "epoch-2", "step-10")]
    for path, step in zip(paths, (30, 20, 10), strict=True):
        path.mkdir(parents=True)
        (path / "adapter.safetensors").write_bytes(os.urandom(1000))
        (path / "trainer_state.json").write_text("{}")
        write_checksums(path, step)
    assert valid_checkpoints(folder, spec) == paths
    damage(paths[0])
    assert re.search(why, str(verify(paths[0])))
    assert valid_checkpoints(folder, spec) == paths[1:]


# Output without end.


def test_of_a_flood_of_output_the_beginning_and_the_end_are_kept(store: JobStore, root: Path) -> None:
    config = tiny_config(root, max_log_bytes=1 << 20)
    folder = JobFolder(new_job(store, config, "job", print_bytes=64_000_000, end=4))
    job = ended(store, new_supervisor(store, config), "job")
    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert "ended with exit code 4; last output: xxx" in str(job.reason)
    text = folder.output.read_text()
    assert len(text) <= 1 << 20
    assert text.startswith("hello from the child\nxxx")
    # What is printed in the very moment of a cut may be lost: here the end of the line before.
    assert re.search(r"xxx\n?about to end badly\n$", text)
    assert "bytes of output were removed here: it had more than 1048576]\n" in text


@pytest.mark.parametrize("line", [b"one line of many\n", b"\xff" * 70_000 + b"\n", b"no end of line "])
def test_what_is_cut_out_is_counted_and_its_writer_goes_on(root: Path, line: bytes) -> None:
    path = root / "output.log"
    with path.open("ab", buffering=0) as file:
        file.write(b"first\n")
        while file.tell() <= 100_000:
            file.write(line)
        size = file.tell()
        assert bound(path, 100_000)
        file.write(b"last\n")
    text = path.read_bytes()
    head, cut, tail = re.fullmatch(
        rb"(.*?)\n\[(\d+) bytes of output were removed .*? 100000\]\n(.*)last\n", text, re.S
    ).groups()
    assert len(head) + int(cut) + len(tail) == size
    assert head.startswith(b"first\n")
    assert len(text) < 60_000
    assert not bound(path, 100_000)
    assert not bound(root / "no such file", 100_000)
