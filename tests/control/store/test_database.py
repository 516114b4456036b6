"""Laws for the file and the connections of a SQLite store."""

import multiprocessing
import stat
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidInput
from tests.support.jobs_support import FORK, submit


@pytest.fixture
def state(root: Path) -> Path:
    return root / "state"


@pytest.fixture
def store(state: Path) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{state}/jobs.db")
    yield store
    store.close()


def test_folder_and_files_are_private(store: JobStore, state: Path) -> None:
    submit(store, "job")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for path in state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def open_together(url: str, together: Barrier, failures: "multiprocessing.Queue[str]") -> None:
    together.wait()
    try:
        JobStore(url).close()
        failures.put("")
    except Exception as error:  # noqa: BLE001  a process's exception would be lost
        failures.put(repr(error))


def test_a_new_store_is_opened_by_many_processes_at_once(root: Path) -> None:
    """If two processes turn a new file into a WAL database, SQLite refuses one without waiting."""
    for number in range(5):
        together, failures = FORK.Barrier(4), FORK.Queue()
        arguments = (f"sqlite:///{root}/{number}/jobs.db", together, failures)
        processes = [FORK.Process(target=open_together, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        assert [failures.get(timeout=60) for _ in processes] == [""] * 4
        for process in processes:
            process.join()


def test_processes_that_come_and_go_leave_the_writers_connected(store: JobStore, state: Path) -> None:
    """Opening a second store must not drop the first one's locks, see `schema._make_private_file`."""
    look = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT id FROM moe_jobs').fetchall())"

    def seen_from_outside() -> str:
        path = state / "jobs.db"
        return subprocess.run([sys.executable, "-SsE", "-c", look, path], capture_output=True, text=True).stdout

    submit(store, "one")
    second = JobStore(f"sqlite:///{state}/jobs.db")
    assert seen_from_outside() == "('one',)\n"
    submit(store, "two")
    assert seen_from_outside() == "('one',) ('two',)\n"
    second.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "no url at all"])
def test_a_store_that_no_other_process_could_see_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="store_url"):
        JobStore(url)


def test_a_store_says_whether_it_answers(store: JobStore, state: Path) -> None:
    assert store.answers()
    store.close()
    (state / "jobs.db").write_bytes(b"this is no database" * 1000)  # the same file
    assert not store.answers()
