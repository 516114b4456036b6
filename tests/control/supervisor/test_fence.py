"""Laws for supervisors that were paused while another one took over: they no longer change anything."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.store.transitions import Fence
from llama_stack_provider_moe.control.supervisor.executors import Child
from llama_stack_provider_moe.control.supervisor.executors.ray import RayExecutor
from llama_stack_provider_moe.control.supervisor.processes import birth, with_environment
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import LeaseLost, Superseded
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_VARIABLE, JOB_VARIABLE, SUPERSEDED, Attempt, read_attempt
from llama_stack_provider_moe.jobdir.cluster_run import read_run
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.executors_config import RayConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import LONG, ended, new_job, new_supervisor, started, submit, tiny_config, wait_for

OTHER = "another/boot/namespace/1/1.0"


@pytest.fixture
def shared(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def running(store: JobStore, supervisor: str = "me") -> Job:
    """A job in progress with a process, which belongs to the supervisor that holds the lease."""
    assert store.acquire_lease(supervisor, 1, 3600)
    submit(store, "job")
    job = store.claim(supervisor, None, True)
    assert job is not None
    return store.launched("job", 10, 1.5, None, Fence.of(supervisor, job))


def taken_over(store: JobStore) -> None:
    """Another supervisor has the lease."""
    assert store.release_lease("me", only_if_idle=False)
    assert store.acquire_lease(OTHER, 2, 3600)


MOVES: dict[str, Callable[[JobStore, Fence], object]] = {
    "requeue": lambda store, fence: store.requeue("job", "lost", (), fence),
    "move": lambda store, fence: store.move("job", JobState.FAILED, fence=fence),
    "check": lambda store, fence: store.check_fence("job", fence),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_supervisor_without_the_lease_moves_nothing(shared: JobStore, move: str) -> None:
    seen = running(shared)
    fence = Fence.of("me", seen)
    taken_over(shared)
    with pytest.raises(LeaseLost, match=f"does not hold the lease; {OTHER} does"):
        MOVES[move](shared, fence)
    assert shared.get("job", None) == seen


@pytest.mark.parametrize("move", MOVES)
def test_who_saw_another_attempt_moves_nothing_though_it_has_the_lease_again(shared: JobStore, move: str) -> None:
    fence = Fence.of("me", running(shared))
    taken_over(shared)
    shared.requeue("job", "lost")
    job = shared.claim(OTHER, None, True)
    assert job is not None
    now = shared.launched("job", 10, 1.5, None, Fence.of(OTHER, job))  # the same pid, as after a boot
    assert shared.release_lease(OTHER, only_if_idle=False)
    assert shared.acquire_lease("me", 1, 3600)
    with pytest.raises(Superseded, match=r"it was in_progress at attempt 1 .* and is in_progress at attempt 2"):
        MOVES[move](shared, fence)
    assert shared.get("job", None) == now


@pytest.mark.parametrize("change", ["pid", "run", "state", "deleted"])
def test_every_part_of_what_was_seen_counts(shared: JobStore, change: str) -> None:
    seen = running(shared)
    fence = Fence.of("me", seen)
    if change == "state":
        shared.move("job", JobState.FAILED)
    elif change == "deleted":
        shared.move("job", JobState.FAILED)
        shared.delete("job", None)
    else:
        fence = fence._replace(pid=11) if change == "pid" else fence._replace(pid=None, run="a-run")
    called: list[str] = []
    with pytest.raises(Superseded):
        shared.requeue("job", "lost", (), fence, lambda: called.append("first"))
    assert called == [], "nothing is touched in the folder either"


def test_claims_and_launches_need_the_lease(shared: JobStore) -> None:
    assert shared.acquire_lease("me", 1, 3600)
    submit(shared, "job")
    submit(shared, "next")
    job = shared.claim("me", None, True)
    assert job is not None
    taken_over(shared)
    with pytest.raises(LeaseLost):
        shared.claim("me", None, True)
    with pytest.raises(LeaseLost):
        shared.launched("job", 10, 1.5, None, Fence.of("me", job))
    assert shared.get("job", None).pid is None
    assert shared.get("next", None).state is JobState.SCHEDULED


def test_nobody_takes_the_lease_or_the_job_while_one_is_moved(new_postgres_url: Callable[[], str]) -> None:
    """A supervisor changes the folder while the job's row is locked; SQLite has one writer anyway."""
    url = new_postgres_url()
    store, other = JobStore(url), JobStore(url)
    seen = running(store)
    waits = "SET lock_timeout = '200ms'"
    refused: list[str] = []

    def meanwhile() -> None:
        with other._writing.connect() as connection:
            for statement in ("SELECT * FROM moe_supervisor FOR UPDATE", "SELECT * FROM moe_jobs FOR UPDATE"):
                connection.exec_driver_sql(waits)
                try:
                    connection.exec_driver_sql(statement)
                except Exception as error:  # noqa: BLE001  psycopg's class is no dependency of the tests
                    refused.append(type(error).__name__)
                connection.rollback()

    store.requeue("job", "lost", (), Fence.of("me", seen), meanwhile)
    assert refused == ["OperationalError", "OperationalError"]
    store.close()
    other.close()


# A supervisor that is paused at a point, while another process does all that it is about to do.


def overtaken(store: JobStore, supervisor: Supervisor, job: Job) -> "subprocess.Popen[bytes]":
    """Another supervisor records the lost job and starts it again, with a live process."""
    assert store.release_lease(supervisor.id, only_if_idle=False)
    assert store.acquire_lease(OTHER, 2, 3600)
    store.requeue(job.id, "lost", (), Fence.of(OTHER, job))
    again = store.claim(OTHER, None, True)
    assert again is not None
    process = subprocess.Popen(
        ["sleep", "1000"], env={JOB_VARIABLE: job.folder, ATTEMPT_VARIABLE: again.attempt, "PATH": os.environ["PATH"]}
    )
    born = birth(process.pid)
    folder = JobFolder(Path(job.folder))
    store.launched(
        job.id, process.pid, born, None, Fence.of(OTHER, again),
        lambda: write_atomic(folder.attempt, Attempt(number=again.attempts, name=again.attempt)),
    )  # fmt: skip
    (folder.artifacts / ".adapter.writing").mkdir(parents=True)
    return process


@pytest.mark.parametrize("at", ["poll", "outcome", "unfinished", "settle"])
def test_a_supervisor_paused_while_it_settles_touches_nothing_of_the_next_attempt(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = JobFolder(new_job(store, config, "job", **LONG))
    supervisor.step()
    pid = started(folder.root)
    first = store.get("job", None)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: birth(pid) is None)
    places = {
        "poll": (supervisor._executors[None], "poll"), "outcome": (supervisor, "_outcome"),
        "unfinished": (disk.Unfinished, "__init__"), "settle": (store, "requeue"),
    }  # fmt: skip
    owner, name = places[at]
    real = getattr(owner, name)
    processes: list[subprocess.Popen[bytes]] = []

    def paused(*arguments: object) -> object:
        during.undo()
        processes.append(overtaken(store, supervisor, first))
        return real(*arguments)

    with monkeypatch.context() as during:
        during.setattr(owner, name, paused)
        with pytest.raises(LeaseLost):
            supervisor.step()
    job = store.get("job", None)
    assert (job.state, job.attempts, job.lost) == (JobState.IN_PROGRESS, 2, 1)
    assert job.pid in with_environment(JOB_VARIABLE, str(folder.root)), "its process was left alone"
    assert (folder.artifacts / ".adapter.writing").is_dir()
    assert read_attempt(folder.root) == Attempt(number=2, name=job.attempt)
    for process in processes:
        process.kill()
        process.wait()


def test_a_supervisor_paused_before_it_launches_starts_no_second_process(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = JobFolder(new_job(store, config, "job"))
    launched = store.launched

    def paused(*arguments: object) -> Job:
        assert store.release_lease(supervisor.id, only_if_idle=False)
        assert store.acquire_lease(OTHER, 2, 3600)
        return launched(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "launched", paused)
    with pytest.raises(LeaseLost):
        supervisor.step()
    assert store.get("job", None).pid is None
    assert not (folder.root / "launches").exists(), "the process ended at the gate"
    assert not folder.attempt.exists()


def test_a_supervisor_that_lost_the_lease_says_so_and_leaves(
    store: JobStore, config: ProviderConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = new_supervisor(store, config)
    new_job(store, config, "job")
    step = supervisor.step

    def paused() -> bool:
        assert store.release_lease(supervisor.id, only_if_idle=False)
        assert store.acquire_lease(OTHER, 2, 3600)
        return step()

    monkeypatch.setattr(supervisor, "step", paused)
    with caplog.at_level("WARNING"):
        assert supervisor.run()
    assert f"does not hold the lease; {OTHER} does; leaving" in caplog.text
    assert store.get("job", None).state is JobState.SCHEDULED


def test_a_process_is_told_its_attempt(store: JobStore, config: ProviderConfig, supervisor: Supervisor) -> None:
    folder = new_job(store, config, "job", killed=1)
    job = ended(store, supervisor, "job")
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert json.loads((folder / "environment.json").read_text())[ATTEMPT_VARIABLE] == job.attempt
    assert read_attempt(folder) == Attempt(number=2, name=job.attempt)


# The process's own side.

WRITES = {
    "event": "from llama_stack_provider_moe.jobdir.events import EventLog, Message\n"
    "log = EventLog(folder.events)\nreplaced()\nlog.append(Message(text='late'))",
    "log": "from llama_stack_provider_moe.jobdir.events import EventLog\nreplaced()\nEventLog(folder.events)",
    "manifest": "from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic\nreplaced()\n"
    "write_atomic(folder.manifest, Manifest(job_uuid='job', artifacts=[], summary={}))",
}


@pytest.mark.parametrize("how", ["by another attempt", "by a later job of that name", "with the folder"])
@pytest.mark.parametrize("write", WRITES)
def test_a_process_whose_attempt_does_not_count_ends_and_writes_nothing(root: Path, write: str, how: str) -> None:
    folder = JobFolder(root / "job")
    folder.root.mkdir()
    write_atomic(folder.attempt, Attempt(number=1, name="1@noon"))
    folder.manifest.write_text("of the other attempt")
    replaced = {
        "by another attempt": 'folder.attempt.write_text(\'{"number": 2, "name": "2@one"}\')',
        "by a later job of that name": 'folder.attempt.write_text(\'{"number": 1, "name": "1@one"}\')',
        "with the folder": "folder.attempt.unlink()",
    }[how]
    code = (
        "import sys\nfrom pathlib import Path\nfrom llama_stack_provider_moe.jobdir.folder import JobFolder\n"
        f"folder = JobFolder(Path(sys.argv[1]))\ndef replaced():\n    {replaced}\n"
        f"try:\n{''.join(f'    {line}' + chr(10) for line in WRITES[write].splitlines())}"
        "except BaseException:\n    print('went on')\nfinally:\n    folder.output.write_text('went on')"
    )
    environment = {**os.environ, JOB_VARIABLE: str(folder.root), ATTEMPT_VARIABLE: "1@noon"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.root)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (SUPERSEDED, ""), done.stderr
    assert "this is attempt 1 of the job and no longer counts" in done.stderr
    assert folder.manifest.read_text() == "of the other attempt"
    assert not folder.output.exists()
    assert not folder.events.exists() or folder.events.read_bytes() == b""


def test_a_supervisor_that_was_overtaken_names_no_run_on_a_cluster(root: Path) -> None:
    """`cluster.json` names the run that counts: written late, it would end the new supervisor's run."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        return httpx.Response(200, json={"ray_version": "2", "submission_id": "x"})

    ray = RayConfig(address="http://127.0.0.1:1")
    executor = RayExecutor(tiny_config(root), ray, httpx.MockTransport(answer))

    def overtaken(child: Child, write: Callable[[], None] | None = None) -> None:
        assert child.attempt == "1@noon"
        raise LeaseLost("another one has it")

    with pytest.raises(LeaseLost):
        executor.submit(root, overtaken, None, "1@noon")
    assert read_run(root) is None
    assert asked == ["GET /api/version"], "nothing was sent"

    def recorded(child: Child, write: Callable[[], None] | None = None) -> None:
        assert write is not None
        write()

    assert executor.submit(root, recorded, None, "1@noon")
    run = read_run(root)
    assert run is not None
    assert run.overrides[ATTEMPT_VARIABLE] == "1@noon"
    assert asked[1:] == ["GET /api/version", "POST /api/jobs/"]
