"""Laws of the supervisor, with training processes that are real but tiny (`tiny_child.py`)."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.executors import Child, Exit
from llama_stack_provider_moe.control.supervisor.executors.local import LocalExecutor, child_environment
from llama_stack_provider_moe.control.supervisor.outcome import outcome
from llama_stack_provider_moe.control.supervisor.processes import PidScope, ProcessName, birth, is_alive
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.output import tail
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import (
    LONG,
    ended,
    new_job,
    new_supervisor,
    started,
    tiny_config,
    wait_for,
)

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
        ("nothing", "with exit code 0 but without a manifest; last output: hello"),
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


@pytest.mark.parametrize("manifest", ['{"job_uuid": "job', '{"job_uuid": "other", "artifacts": [], "summary": {}}'])
def test_a_manifest_that_is_not_this_jobs_completes_nothing(
    store: JobStore, config: ProviderConfig, supervisor: Supervisor, manifest: str
) -> None:
    folder = new_job(store, config, "job", end="nothing")
    (folder / "manifest.json").write_text(manifest)  # a first start overwrites nothing
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
    supervisor = new_supervisor(store, nowhere)
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
    supervisor = new_supervisor(store, config)
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
    supervisor = new_supervisor(store, config)
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
        assert outcome(job, Exit(code), 1).state is JobState.COMPLETED
    assert outcome(job, Exit(1), 1).state is JobState.CANCELLED
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
    ended(store, new_supervisor(store, config), "job")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["HF_TOKEN"] == "for gated models"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PYTHONPATH"] == f"{Path.cwd() / 'here'}{os.pathsep}/there"
    assert environment["PATH"] == os.environ["PATH"]
    assert "secret" not in environment.values()
    assert (
        environment.keys() - {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
        <= child_environment(os.environ, config, folder, attempt="").keys()
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
    """The store has this test's own pid, as another machine, or this one before a restart, could have recorded it."""
    here, own = PidScope.here(), ProcessName.current()
    host = here.host if where == "another boot" else "some-other-host"
    folder = new_job(store, config, "job")
    store.claim(str(ProcessName(PidScope(host, "another-boot", here.namespace), 1, 2.0)))
    store.launched("job", own.pid, own.pid_birth)
    (folder / "output.log").write_text("alive\n")
    if where == "another machine, silent":
        monkeypatch.setattr("llama_stack_provider_moe.control.supervisor.supervisor.SILENCE_S", 0.0)
    supervisor.step()
    job = store.get("job", None)
    if where == "another machine":
        assert (job.state, job.attempts) == (JobState.IN_PROGRESS, 1)
    elif where == "another boot":
        assert (job.state, job.attempts, job.lost) == (JobState.IN_PROGRESS, 2, 1)
        assert "while no supervisor watched it" in str(job.reason)
        assert ended(store, supervisor, "job").state is JobState.COMPLETED
    else:
        assert job.state is JobState.FAILED, "it may still run there"
        assert "'some-other-host'" in str(job.reason)
    assert birth(own.pid) == own.pid_birth


def test_exit_codes_are_unknown_only_of_strangers() -> None:
    config = ProviderConfig()
    assert LocalExecutor(config).poll(Child(Path("/nowhere"), 2**22 + 1, 1.0)) == Exit(None)
