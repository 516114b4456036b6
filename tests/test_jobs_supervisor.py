"""Laws of the supervisor, with training processes that are real but tiny (`tiny_child.py`)."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobs.events import read
from llama_stack_provider_moe.jobs.executors import Child, Exit
from llama_stack_provider_moe.jobs.executors.local import LocalExecutor, child_environment
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.outcome import outcome
from llama_stack_provider_moe.jobs.output import tail
from llama_stack_provider_moe.jobs.processes import Place, ProcessName, birth, is_alive, with_environment
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore
from llama_stack_provider_moe.jobs.supervisor import Supervisor, ensure_supervisor, supervise
from tests.jobs_support import FORK, new_job, ram_folder, tiny_config, wait_for, wait_until_ended

LONG = {"steps": 1000, "step_s": 0.05}


@pytest.fixture
def root() -> Iterator[Path]:
    with ram_folder() as folder:
        yield folder
        for job in (folder / "jobs").glob("*"):  # whatever a failed test left running
            for pid in with_environment("MOE_JOB_FOLDER", str(job)):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def config(root: Path) -> ProviderConfig:
    return tiny_config(root)


@pytest.fixture
def store(config: ProviderConfig) -> Iterator[JobStore]:
    store = JobStore(config.url)
    yield store
    store.close()


@pytest.fixture
def supervisor(store: JobStore, config: ProviderConfig) -> Supervisor:
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    return supervisor


def run_until_idle(supervisor: Supervisor) -> None:
    wait_for(lambda: not supervisor.step())


def ended(store: JobStore, supervisor: Supervisor, job_id: str) -> Job:
    run_until_idle(supervisor)
    return store.get(job_id, None)


def reap(job: Job, executor: LocalExecutor) -> None:
    """Collect a dead child of this very process, through what it was started with."""
    assert job.pid is not None
    assert job.pid_birth is not None
    child = Child(Path(job.folder), job.pid, job.pid_birth)
    wait_for(lambda: executor.poll(child))


def started(folder: Path) -> int:
    """Pid of a job's child, once it has begun."""
    wait_for(lambda: read(JobFolder(folder).events).events)
    return int((folder / "launches").read_text().split()[-1])


# How a job ends.


def test_a_job_that_leaves_a_manifest_completes_with_its_artifacts(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job")
    job = ended(store, supervisor, "job")
    assert (job.state, job.reason, job.attempts) == (JobState.COMPLETED, None, 1)
    assert [artifact.identifier for artifact in job.artifacts] == ["job/adapter-0"]
    assert job.started_at is not None
    assert job.ended_at is not None
    assert job.scheduled_at <= job.started_at <= job.ended_at
    assert (folder / "output.log").read_text() == "hello from the child\n"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("failed", "^the rows of this job are too strange$"),
        (3, "ended with exit code 3; last output: hello from the child\nabout to end badly$"),
        ("nothing", "without a manifest, though with exit code 0; last output: hello"),
    ],
)
def test_a_job_without_a_manifest_fails_and_says_why(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, end: str | int, reason: str
) -> None:
    new_job(store, config, "job", end=end)
    job = ended(store, supervisor, "job")
    assert job.state is JobState.FAILED
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(job.reason)


def test_a_killed_child_fails_its_job_by_the_signals_name(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    os.kill(started(folder), signal.SIGKILL)
    job = ended(store, supervisor, "job")
    assert job.state is JobState.FAILED
    assert job.reason is not None
    assert job.reason.startswith("the training process was killed by SIGKILL (out of memory?); last output: hello")


@pytest.mark.parametrize("manifest", ['{"job_uuid": "job', '{"job_uuid": "other", "artifacts": [], "summary": {}}'])
def test_a_manifest_that_is_not_this_jobs_completes_nothing(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, manifest: str
) -> None:
    folder = new_job(store, config, "job", end="nothing")
    (folder / "manifest.json").write_text(manifest)
    job = ended(store, supervisor, "job")
    assert (job.state, job.artifacts) == (JobState.FAILED, ())
    assert "manifest that can't be read" in str(job.reason)


def test_a_manifest_does_not_excuse_an_exit_code(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job", end=4)
    (folder / "manifest.json").write_text('{"job_uuid": "job", "artifacts": [], "summary": {}}')
    assert "exit code 4" in str(ended(store, supervisor, "job").reason)


def test_what_can_not_be_started_fails(store: JobStore, config: ProviderConfig) -> None:
    nowhere = config.model_copy(update={"training_python": "/no/such/python"})
    supervisor = Supervisor(store, nowhere)
    new_job(store, nowhere, "no-python")
    store.submit("no-folder", "ann", "sft", "m", "/no/such/folder")
    assert "exit code 127; last output" in str(ended(store, supervisor, "no-python").reason)
    assert "/no/such/python" in str(store.get("no-python", None).reason)
    assert "could not be started" in str(store.get("no-folder", None).reason)
    assert "/no/such/folder" in str(store.get("no-folder", None).reason)


def test_nothing_a_child_started_outlives_it(store: JobStore, config: ProviderConfig, supervisor: Supervisor) -> None:
    folder = new_job(store, config, "job", grandchild=True)
    assert ended(store, supervisor, "job").state is JobState.COMPLETED
    grandchild = int((folder / "grandchild").read_text())
    wait_for(lambda: birth(grandchild) is None)


def test_fifty_megabytes_of_output_are_drained_and_read_in_bounds(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job", print_bytes=50_000_000, end=1)
    job = ended(store, supervisor, "job")
    assert (folder / "output.log").stat().st_size > 50_000_000
    assert len(tail(folder / "output.log", 1000)) <= 1000
    assert job.reason is not None
    assert len(job.reason) < 1200


# Queue and cancelling.


def test_at_most_so_many_at_a_time_and_the_oldest_first(store: JobStore, root: Path) -> None:
    config = tiny_config(root, max_concurrent_jobs=2)
    supervisor = Supervisor(store, config)
    folders = [new_job(store, config, f"job{number}", steps=5) for number in range(4)]
    most = 0
    while supervisor.step():
        most = max(most, len(store.running()))
        time.sleep(0.005)
    assert most == 2
    jobs = [store.get(folder.name, None) for folder in folders]
    assert [job.state for job in jobs] == [JobState.COMPLETED] * 4
    starts = [job.started_at for job in jobs if job.started_at is not None]
    assert starts == sorted(starts)


def test_a_job_cancelled_while_it_waits_never_starts(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job")
    store.request_cancel("job", None)
    job = ended(store, supervisor, "job")
    assert (job.state, job.attempts, job.pid) == (JobState.CANCELLED, 0, None)
    assert not (folder / "output.log").exists()


def test_a_cancelled_job_keeps_what_it_saved(store: JobStore, config: ProviderConfig, supervisor: Supervisor) -> None:
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    started(folder)
    store.request_cancel("job", None)
    job = ended(store, supervisor, "job")
    assert job.state is JobState.CANCELLED
    assert [artifact.kind for artifact in job.artifacts] == ["checkpoint"]
    assert job.reason == f"cancelled at step {job.artifacts[0].step}, after saving a checkpoint"


def test_a_child_that_will_not_stop_is_killed_after_the_grace(store: JobStore, root: Path) -> None:
    config = tiny_config(root, cancel_grace_s=0.3)
    supervisor = Supervisor(store, config)
    folder = new_job(store, config, "job", on_term="ignore", grandchild=True, **LONG)
    supervisor.step()
    pid = started(folder)
    wait_for((folder / "grandchild").exists)
    store.request_cancel("job", None)
    asked = time.monotonic()
    job = ended(store, supervisor, "job")
    assert job.state is JobState.CANCELLED
    assert time.monotonic() - asked >= 0.3
    for dead in (pid, int((folder / "grandchild").read_text())):
        wait_for(lambda dead=dead: birth(dead) is None)  # type: ignore[misc]


def test_a_cancel_that_came_too_late_leaves_a_completed_job(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job")
    supervisor.step()
    wait_for((folder / "manifest.json").exists)
    job = store.request_cancel("job", None)
    assert job.cancel_requested_at is not None
    for code in (0, None, -signal.SIGTERM, -signal.SIGKILL):  # it may be on its way out when the signal comes
        assert outcome(job, Exit(code)).state is JobState.COMPLETED
    assert outcome(job, Exit(1)).state is JobState.CANCELLED
    assert ended(store, supervisor, "job").state is JobState.COMPLETED


# Who may run what.


def test_a_child_gets_what_it_needs_and_no_secret_of_the_server(
    store: JobStore, config: ProviderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("HF_TOKEN", "for gated models")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("PYTHONPATH", f"here{os.pathsep}/there")
    config = config.model_copy(update={"child_env": {"HF_HUB_OFFLINE": "1"}})
    folder = new_job(store, config, "job")
    ended(store, Supervisor(store, config), "job")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["HF_TOKEN"] == "for gated models"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONPATH"] == f"{Path.cwd() / 'here'}{os.pathsep}/there"
    assert environment["PATH"] == os.environ["PATH"]
    assert "secret" not in environment.values()
    assert (
        environment.keys() - {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
        <= child_environment(os.environ, config, folder).keys()
    ), "what is there beside ours, the shell added"


def test_a_process_that_could_not_be_recorded_never_runs(config: ProviderConfig, store: JobStore) -> None:
    folder = new_job(store, config, "job")
    executor = LocalExecutor(config)
    seen: list[Child] = []

    def refuse(child: Child) -> None:
        seen.append(child)
        assert is_alive(child.pid, child.birth), "it waits"
        raise Conflict("somebody else has it")

    with pytest.raises(Conflict):
        executor.submit(folder, refuse)
    assert birth(seen[0].pid) is None
    assert not (folder / "launches").exists()


def test_a_job_whose_claimer_died_before_the_launch_is_launched_once(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor
) -> None:
    folder = new_job(store, config, "job")
    store.claim("somebody who died")
    job = ended(store, supervisor, "job")
    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
    assert len((folder / "launches").read_text().split()) == 1


@pytest.mark.parametrize("where", ["another boot", "another machine", "another machine, silent"])
def test_pids_of_other_places_are_not_ours_to_judge(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pid of this very test stands in the store, as a machine that had it before, or another, would have put it."""
    here, own = Place.here(), ProcessName.own()
    host = here.host if where == "another boot" else "some-other-host"
    folder = new_job(store, config, "job")
    store.claim(str(ProcessName(Place(host, "another-boot", here.namespace), 1, 2.0)))
    store.launched("job", own.pid, own.pid_birth)
    (folder / "output.log").write_text("alive\n")
    if where == "another machine, silent":
        monkeypatch.setattr("llama_stack_provider_moe.jobs.supervisor.SILENCE_S", 0.0)
    supervisor.step()
    job = store.get("job", None)
    if where == "another machine":
        assert job.state is JobState.IN_PROGRESS
    else:
        assert job.state is JobState.FAILED
        assert "while no supervisor watched it" in str(job.reason)


# Supervisors that come and go.


@pytest.fixture
def supervisor_process(config: ProviderConfig) -> Iterator[Callable[[], BaseProcess]]:
    """Starts supervisors, each in a process of its own; ends those that are left."""
    processes: list[BaseProcess] = []

    def start(config: ProviderConfig = config) -> BaseProcess:
        process = FORK.Process(target=supervise, args=(config,))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_child_outlives_a_killed_supervisor_and_is_adopted(
    config: ProviderConfig, supervisor_process: Callable[[], BaseProcess]
) -> None:
    first = supervisor_process()
    store = JobStore(config.url)
    folder = new_job(store, config, "job", steps=40, step_s=0.05)
    pid = started(folder)
    first.kill()
    first.join()
    assert birth(pid) is not None
    assert JobFolder(folder).read_manifest() is None
    store.close()
    supervisor_process()
    store = JobStore(config.url)
    job = wait_until_ended(store, "job")
    assert (job.state, job.pid, job.attempts) == (JobState.COMPLETED, pid, 1)
    assert (folder / "launches").read_text().split() == [str(pid)]
    steps = [event.step for event in read(JobFolder(folder).events).events if event.type == "step"]
    assert steps == list(range(1, 41))
    store.close()


def test_an_adopted_child_can_be_cancelled_and_one_that_died_unseen_is_settled(
    store: JobStore, config: ProviderConfig, root: Path
) -> None:
    config = tiny_config(root, max_concurrent_jobs=2)
    executor = LocalExecutor(config)
    folders = [new_job(store, config, name, grandchild=True, **LONG) for name in ("cancelled", "died")]
    Supervisor(store, config, executor).step()  # and no more is seen of it
    pids = [started(folder) for folder in folders]
    wait_for((folders[1] / "grandchild").exists)
    os.kill(pids[1], signal.SIGKILL)
    wait_for(lambda: birth(pids[1]) is None)
    store.request_cancel("cancelled", None)
    run_until_idle(Supervisor(store, config))
    cancelled, died = store.get("cancelled", None), store.get("died", None)
    assert (cancelled.state, len(cancelled.artifacts)) == (JobState.CANCELLED, 1)
    assert died.state is JobState.FAILED
    assert "while no supervisor watched it" in str(died.reason)
    for folder in folders:
        orphan = int((folder / "grandchild").read_text())
        wait_for(lambda orphan=orphan: birth(orphan) is None)  # type: ignore[misc]
    for job in (cancelled, died):
        reap(job, executor)


def test_a_supervisor_asked_to_leave_frees_the_lease_and_leaves_its_children(
    config: ProviderConfig, supervisor_process: Callable[[], BaseProcess]
) -> None:
    process = supervisor_process()
    store = JobStore(config.url)
    folder = new_job(store, config, "job", **LONG)
    pid = started(folder)
    process.terminate()
    process.join(10)
    assert process.exitcode == 0
    assert store.live_supervisor() is None
    job = store.get("job", None)
    assert (job.state, job.pid) == (JobState.IN_PROGRESS, pid)
    assert job.pid_birth is not None
    assert is_alive(pid, job.pid_birth)
    os.kill(pid, signal.SIGKILL)
    store.close()


def test_of_two_supervisors_the_second_ends_and_a_dead_ones_lease_is_taken_at_once(
    root: Path, supervisor_process: Callable[..., BaseProcess]
) -> None:
    config = tiny_config(root, lease_s=100)
    first = supervisor_process(config)
    store = JobStore(config.url)
    wait_for(store.live_supervisor)
    store.close()
    second = supervisor_process(config)
    second.join(60)
    assert second.exitcode == 0
    assert first.is_alive()
    first.kill()
    first.join()
    third = supervisor_process(config)
    store = JobStore(config.url)
    began = time.monotonic()
    wait_for(lambda: (live := store.live_supervisor()) is not None and live.pid == third.pid)
    assert time.monotonic() - began < config.supervisor.lease_s, "without waiting for the lease to run out"
    store.close()


def test_a_supervisor_that_lost_its_lease_leaves_without_touching_anything(
    store: JobStore, config: ProviderConfig
) -> None:
    executor = LocalExecutor(config)
    supervisor = Supervisor(store, config, executor)
    assert supervisor.acquire()
    folder = new_job(store, config, "job", **LONG)
    supervisor.step()
    pid = started(folder)
    store.release_lease(supervisor.id, only_if_idle=False)
    assert store.acquire_lease("another", 1, 60)
    assert supervisor.run()
    live = store.live_supervisor()
    assert live is not None
    assert live.id == "another"
    job = store.get("job", None)
    assert job.state is JobState.IN_PROGRESS
    assert birth(pid) is not None
    os.kill(pid, signal.SIGKILL)
    reap(job, executor)


def test_a_store_that_fails_for_a_moment_ends_nothing(
    store: JobStore, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(root, idle_exit_s=0)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    new_job(store, config, "job")
    failures = iter([OSError("disk is full")] * 3)
    running = store.running

    def failing() -> list[Job]:
        for failure in failures:
            raise failure
        return running()

    monkeypatch.setattr(store, "running", failing)
    assert supervisor.run()
    assert store.get("job", None).state is JobState.COMPLETED


# Started by a server.


def zombies() -> list[int]:
    """Children of this process that have ended and were not reaped."""
    mine = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] == "Z" and int(fields[1]) == os.getpid():
            mine.append(int(stat.parent.name))
    return mine


def test_servers_start_one_supervisor_which_leaves_when_idle_and_is_started_again(root: Path) -> None:
    config = tiny_config(root, idle_exit_s=0.2, poll_s=0.1)
    stores = [JobStore(config.url) for _ in range(4)]
    folder = new_job(stores[0], config, "first", steps=20, step_s=0.1)
    begun: list[bool] = []
    servers = [
        threading.Thread(target=lambda store=store: begun.append(ensure_supervisor(config, store)))  # type: ignore[misc]
        for store in stores
    ]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert sorted(begun) == [False, False, False, True]
    started(folder)
    live = stores[0].live_supervisor()
    assert live is not None
    assert os.getsid(live.pid) == live.pid, "detached"
    assert "torch" not in Path(f"/proc/{live.pid}/maps").read_text()
    assert not ensure_supervisor(config, stores[1])
    assert wait_until_ended(stores[0], "first").state is JobState.COMPLETED
    wait_for(lambda: stores[0].live_supervisor() is None)
    new_job(stores[2], config, "second")
    assert ensure_supervisor(config, stores[2])
    assert wait_until_ended(stores[3], "second").state is JobState.COMPLETED
    wait_for(lambda: not any(thread.name == "moe-supervisor" for thread in threading.enumerate()))
    assert zombies() == []
    log = (root / "supervisor.log").read_text()
    assert log.count("supervisor of ") == 2
    assert "ERROR" not in log
    for store in stores:
        store.close()


def test_a_server_told_not_to_starts_none(store: JobStore, root: Path) -> None:
    config = tiny_config(root, start=False)
    new_job(store, config, "job")
    assert not ensure_supervisor(config, store)


def test_exit_codes_are_unknown_only_of_strangers() -> None:
    config = ProviderConfig()
    assert LocalExecutor(config).poll(Child(Path("/nowhere"), 2**22 + 1, 1.0)) == Exit(None)
