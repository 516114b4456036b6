"""A disk that jobs have filled: ends of jobs are still recorded, jobs can be deleted, and reports are true.

The state folder and the job store are on one small file system; `fill` uses all of it.
"""

import errno
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.reserve import RESERVE_BYTES
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.control.supervisor.executors import Exit
from llama_stack_provider_moe.control.supervisor.outcome import outcome
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.events import EventLog, Failed
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import BODY, ask, folder_of, serving_in_process, submit
from tests.support.jobs_support import fill, new_job, new_supervisor, started, tiny_config, wait_for


@pytest.fixture
def service(small: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(small) as made:
        yield made


def test_an_end_is_written_down_on_a_full_disk_and_what_waits_begins_once_there_is_room(small: Path) -> None:
    config = tiny_config(small)
    store = JobStore(config.url)
    folder = new_job(store, config, "job", steps=1000, step_s=0.05)
    new_job(store, config, "next")
    supervisor = new_supervisor(store, config)
    assert supervisor.step()
    pid = started(folder)
    ballast = fill(small)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not supervisor.step() and store.get("job", None).state.ended)
    job = store.get("job", None)
    assert job.state is JobState.FAILED
    assert str(job.reason).startswith("the disk is full")
    assert "nothing was saved: free some space and resume the job, which starts from the beginning" in str(job.reason)
    for _ in range(300):  # more than there is room for, unless the log of changes is used again
        assert store.beat(supervisor.id, 60.0)
    assert not supervisor.step()
    waits = store.get("next", None)
    assert waits.state is JobState.SCHEDULED, "it would fail for the same disk"
    assert "the job begins once there is room" in progress(waits, JobFolder(Path(waits.folder)))["reason"]
    ballast.unlink()
    wait_for(lambda: not supervisor.step() and store.get("next", None).state.ended)
    assert store.get("next", None).state is JobState.COMPLETED
    assert Path(f"{config.state_dir}/jobs.db-reserve").stat().st_size == RESERVE_BYTES, "it is made again"
    store.close()


def test_a_job_is_deleted_and_one_cancelled_on_a_full_disk(small: Path, service: PostTrainingService) -> None:
    waits, old = submit(service), submit(service)
    service.store.request_cancel(old, None)
    folder = folder_of(service, old)
    folder.artifacts.mkdir()
    (folder.artifacts / "weights").write_bytes(bytes(3 << 20))
    fill(small)
    health = ask(service, "GET", "/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert "the disk is full" in health.json()["reason"]
    assert "no supervisor can write" in health.json()["reason"]
    assert ask(service, "POST", f"/jobs/{waits}/cancel").status_code == 200
    assert ask(service, "POST", "/jobs", json=BODY).status_code == 507, "what is left is the store's"
    assert ask(service, "DELETE", f"/jobs/{old}").status_code == 200
    assert not folder.root.exists()
    health = ask(service, "GET", "/health").json()
    assert (health["status"], health["reason"]) == ("ok", None)
    assert ask(service, "POST", "/jobs", json=BODY).status_code == 200


def test_a_server_and_a_supervisor_start_on_a_full_disk(small: Path) -> None:
    with serving_in_process(small) as service:
        job_id = submit(service)
    fill(small)
    with serving_in_process(small) as service:
        store = JobStore(service.config.url)
        new_supervisor(store, service.config)
        store.close()
        assert ask(service, "POST", f"/jobs/{job_id}/cancel").status_code == 200
        assert ask(service, "DELETE", f"/jobs/{job_id}").status_code == 200


@pytest.mark.parametrize("told", [True, False], ids=["it said so", "it was killed"])
def test_a_job_whose_end_can_not_be_written_down_does_not_look_as_if_it_ran(small: Path, told: bool) -> None:
    """The store may be a database on another disk that is full; here nobody can record the end."""
    config = tiny_config(small)
    store = JobStore(config.url)
    folder = new_job(store, config, "job", steps=1000, step_s=0.05)
    supervisor = new_supervisor(store, config)
    assert supervisor.step()
    pid = started(folder)
    wait_for(lambda: progress(store.get("job", None), JobFolder(folder))["stage"] == "training")
    if told:
        log = EventLog(JobFolder(folder).events)
        log.append(Failed(reason="the disk is full (of weights)", error="OSError"))
        log.close()
    fill(small)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    shown = progress(store.get("job", None), JobFolder(folder))
    assert (shown["stage"], shown["eta_s"], shown["work"]) == ("ending", None, None)
    what = "ended: the disk is full (of weights)" if told else "ended: its process is gone"
    assert shown["reason"].startswith(f"{what}; the job store can't record this until there is room: the disk")
    wait_for(lambda: not supervisor.step())
    assert store.get("job", None).state is JobState.FAILED
    store.close()


def test_what_a_process_says_of_a_full_disk_is_completed_by_what_it_has_saved(store: JobStore, root: Path) -> None:
    folder = JobFolder(new_job(store, tiny_config(root), "job"))
    store.claim("me")
    job = store.launched("job", 1, 1.0)
    log = EventLog(folder.events)
    log.append(Failed(reason="the disk is full ([Errno 28] No space left on device)", error="OSError"))
    log.close()
    told = outcome(job, Exit(1), 3).reason
    assert told == (
        "the disk is full ([Errno 28] No space left on device); nothing was saved: free some space and resume "
        "the job, which starts from the beginning"
    )


FAILURES = {
    "full": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full", 0),
    "full store": (OperationalError("UPDATE", {}, Exception("database or disk is full")), "the disk is full", 0),
    "lost store": (OperationalError("UPDATE", {}, Exception("disk I/O error")), "the job store does not answer", 0),
    "a fault": (KeyError("of ours"), "an unexpected error occurred", 1),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_that_lasts_is_told_once_and_only_the_unexpected_with_a_traceback(
    store: JobStore, root: Path, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error, line, tracebacks = FAILURES[failure]
    config = tiny_config(root, idle_exit_s=0)
    new_job(store, config, "job")
    running, looks = store.running, iter(range(5))

    def failing() -> list[Job]:
        for _ in looks:
            raise error
        return running()

    monkeypatch.setattr(store, "running", failing)
    supervisor = Supervisor(store, config)
    assert supervisor.acquire()
    with caplog.at_level(logging.INFO, logger="llama_stack_provider_moe.supervisor"):
        assert supervisor.run()
    told = [record for record in caplog.records if "trying again" in record.getMessage()]
    assert [record.getMessage().startswith(line) for record in told] == [True]
    assert sum(record.exc_info is not None for record in caplog.records) == tracebacks
    assert "the failed operations work again" in caplog.text


def test_a_resumed_job_is_told_to_start_from_the_beginning_where_nothing_is_saved(tmp_path: Path) -> None:
    with serving_in_process(tmp_path) as service:
        job_id = submit(service)
        service.store.request_cancel(job_id, None)
        answer = ask(service, "POST", f"/jobs/{job_id}/resume").json()
        assert answer == {"job_uuid": job_id, "resumes": "from_beginning"}
