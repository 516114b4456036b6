"""Laws of jobs on a Ray cluster: a real one, started here; no job is lost, and none runs twice."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.jobs.cluster_run import read_run
from llama_stack_provider_moe.jobs.events import read
from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job, JobStore, NewJob
from llama_stack_provider_moe.jobs.supervisor import Supervisor
from tests.jobs_support import LONG, job_folders, wait_for
from tests.ray_cluster import Cluster
from tests.training_support import workshop

__all__ = ["workshop"]

TINY_DRIVER = Path(__file__).with_name("tiny_driver.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One of two nodes."""
    made = Cluster()
    try:
        made.start(nodes=2)
        yield made
    finally:
        made.close()


def config_for(folder: Path, address: str, python: str = sys.executable, **ray: Any) -> ProviderConfig:
    return ProviderConfig.model_validate({
        "state_dir": folder,
        "supervisor": {"poll_s": 0.05, "cancel_grace_s": 300, "max_concurrent_jobs": 8, "warm": False},
        "executors": {"ray": {"address": address, "python": python, **ray}},
        "child_env": {"TOLD": "of child_env"},
    })  # fmt: skip


def tiny_python(folder: Path) -> str:
    """An interpreter that runs tiny drivers."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ntest "$2" = llama_stack_provider_moe.training.on_ray || exit 99\nshift 2\n'
                      f'exec "{sys.executable}" -S "{TINY_DRIVER}" "$@"\n')  # fmt: skip
    script.chmod(0o755)
    return str(script)


class Office:
    """A store, and supervisors of it one after the other."""

    def __init__(self, config: ProviderConfig) -> None:
        self.config = config
        self.store = JobStore(config.url)
        self.supervisor = Supervisor(self.store, config)

    def submit(self, job_id: str, **plan: Any) -> None:
        folder = self.config.jobs_dir / job_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "child.json").write_text(json.dumps(plan))
        self.store.add(NewJob(job_id, "ann", "sft", "some/model", str(folder), 0, None, "ray"))

    def job(self, job_id: str) -> Job:
        return self.store.get(job_id, None)

    def until(self, what: Any, limit_s: float = 600) -> Any:
        def look() -> Any:
            self.supervisor.step()
            return what()

        return wait_for(look, limit_s)

    def steps(self, job_id: str) -> int:
        events = read(JobFolder(self.config.jobs_dir / job_id).events).events
        return max((event.step for event in events if event.type == "step"), default=0)

    def ended(self, job_id: str) -> Job:
        job: Job = self.until(lambda: job if (job := self.job(job_id)).state.ended else None)
        return job


def test_jobs_end_on_ray_as_they_end_here(cluster: Cluster) -> None:
    """Each way to end; a cancelled one saves and is resumed; one is adopted by the next supervisor."""
    with job_folders() as root:
        office = Office(config_for(root, cluster.url, tiny_python(root)))
        office.submit("completes", print_bytes=200)
        office.submit("fails", end="failed")
        office.submit("exits", end=7)
        office.submit("killed", killed=1)
        office.submit("cancelled", **LONG)
        office.submit("adopted", steps=400, step_s=0.05)
        office.until(lambda: office.steps("cancelled") > 2 and office.steps("adopted") > 2)
        office.store.request_cancel("cancelled", None)
        before = office.job("adopted")
        office.supervisor = Supervisor(office.store, office.config)
        job = office.ended("completes")
        assert (job.state, job.reason, job.attempts, job.pid, job.devices) == (JobState.COMPLETED, None, 1, None, "")
        folder = Path(job.folder)
        told = json.loads((folder / "environment.json").read_text())
        assert told["MOE_JOB_FOLDER"] == str(folder)
        assert office.ended("fails").reason == "the rows of this job are too strange"
        assert str(office.ended("exits").reason).endswith("ended with exit code 7; last output: "
                                                          "hello from the child\nabout to end badly")  # fmt: skip
        killed = office.ended("killed")
        assert (killed.state, killed.attempts, killed.lost) == (JobState.COMPLETED, 2, 1)
        cancelled = office.ended("cancelled")
        assert cancelled.state is JobState.CANCELLED
        assert str(cancelled.reason).endswith("after saving a checkpoint")
        adopted = office.ended("adopted")
        assert (adopted.state, adopted.attempts, adopted.run) == (JobState.COMPLETED, 1, before.run)
        assert len((Path(adopted.folder) / "launches").read_text().split()) == 1
        left = read_run(folder)
        assert left is not None
        assert (left.wish, left.environment, left.overrides) == ("kill", {}, {}), "what is secret does not stay"
        office.store.close()
