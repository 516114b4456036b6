"""Laws for jobs on a real Ray cluster, started here: no job is lost, and none runs twice."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_stack_provider_moe.compute.worker.main import FAILED
from llama_stack_provider_moe.compute.worker.ray import actor, group
from llama_stack_provider_moe.compute.worker.ray.actor import Node, environment
from llama_stack_provider_moe.compute.worker.ray.node import wished_signal
from llama_stack_provider_moe.control.store.store import Job, JobStore, NewJob
from llama_stack_provider_moe.control.supervisor.processes import with_environment
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.jobdir.cluster_run import RUN_FILE, ClusterRun, read_run
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.free_ports import free_port
from tests.support.host_support import serving_in_process, submit
from tests.support.jobs_support import LONG, job_folders, new_supervisor, wait_for
from tests.support.ray_cluster import Cluster
from tests.support.training_support import Run, Workshop, sft_rows, workshop

__all__ = ["workshop"]

# Greatest difference of a final weight; measured after 48 steps: 6.6e-6.
ATOL = 1e-4
TINY_DRIVER = Path(__file__).parents[2] / "support" / "tiny_driver.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes."""
    made = Cluster()
    try:
        made.start(nodes=2)
        yield made
    finally:
        made.close()


def config_for(folder: Path, cluster: Cluster | str, python: str = sys.executable, **ray: Any) -> ProviderConfig:
    if isinstance(cluster, Cluster):
        ray = {"address": cluster.url, "token_file": cluster.token_file, **ray}
    else:
        ray["address"] = cluster
    return ProviderConfig.model_validate({
        "state_dir": folder,
        "supervisor": {"poll_s": 0.05, "cancel_grace_s": 300, "max_concurrent_jobs": 8, "warm": False},
        "executors": {"ray": {"python": python, **ray}},
        "child_env": {"TOLD": "of child_env"},
    })  # fmt: skip


def tiny_python(folder: Path) -> str:
    """An interpreter that runs tiny drivers."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ntest "$2" = llama_stack_provider_moe.compute.worker.ray.group || exit 99\nshift 2\n'
                      f'exec "{sys.executable}" -S "{TINY_DRIVER}" "$@"\n')  # fmt: skip
    script.chmod(0o755)
    return str(script)


class Office:
    """A store, and its supervisors one after the other."""

    def __init__(self, config: ProviderConfig) -> None:
        self.config = config
        self.store = JobStore(config.url)
        self.supervisor = new_supervisor(self.store, config)

    def submit(self, job_id: str, **plan: Any) -> None:
        folder = self.config.jobs_dir / job_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "child.json").write_text(json.dumps(plan))
        self.store.add(NewJob(job_id, "ann", "sft", "some/model", str(folder), 0, None, "ray"))

    def job(self, job_id: str) -> Job:
        return self.store.get(job_id, None)

    def until(self, what: Any, limit_s: float = 600) -> Any:
        until = time.monotonic() + limit_s
        while True:
            self.supervisor.step()
            if answer := what():
                return answer
            assert time.monotonic() < until, "it did not happen in time"
            time.sleep(0.1)  # each look is a request to the cluster

    def steps(self, job_id: str) -> int:
        events = read(JobFolder(self.config.jobs_dir / job_id).events).events
        return max((event.step for event in events if event.type == "step"), default=0)

    def ended(self, job_id: str) -> Job:
        job: Job = self.until(lambda: job if (job := self.job(job_id)).state.ended else None)
        return job


def test_jobs_end_on_ray_as_they_end_here(cluster: Cluster) -> None:
    """All kinds of ends; one job is adopted by the next supervisor and still runs only once."""
    with job_folders() as root:
        office = Office(config_for(root, cluster, tiny_python(root)))
        office.submit("fails", end="failed")
        office.submit("killed", killed=1)
        office.submit("cancelled", **LONG)
        office.submit("adopted", steps=400, step_s=0.05)
        office.until(lambda: office.steps("cancelled") > 2 and office.steps("adopted") > 2)
        office.store.request_cancel("cancelled", None)
        before = office.job("adopted")
        office.supervisor = new_supervisor(office.store, office.config)
        assert office.ended("fails").reason == "the rows of this job are too strange"
        assert "hello from the child" in (root / "jobs/fails/output.log").read_text(), "of what Ray kept"
        killed = office.ended("killed")
        assert (killed.state, killed.attempts, killed.lost) == (JobState.COMPLETED, 2, 1)
        cancelled = office.ended("cancelled")
        assert cancelled.state is JobState.CANCELLED
        assert str(cancelled.reason).endswith("after saving a checkpoint")
        job = office.ended("adopted")
        assert (job.state, job.attempts, job.run) == (JobState.COMPLETED, 1, before.run), job.reason
        assert (job.reason, job.pid, job.devices) == (None, None, "")
        folder = Path(job.folder)
        assert len((folder / "launches").read_text().split()) == 1
        left = read_run(folder)
        assert left is not None
        assert (left.wish, left.environment, left.overrides) == ("kill", {}, {}), "what is secret does not stay"
        office.submit("stranger")
        office.supervisor = new_supervisor(office.store, config_for(root, cluster.url, unreachable_s=0))
        assert "it expects a token (`executors.ray.token_file`)" in str(office.ended("stranger").reason)
        office.store.close()


def test_a_job_of_two_nodes_leaves_what_one_process_leaves(cluster: Cluster, workshop: Workshop) -> None:
    """The job is cancelled on two nodes and resumed on one with as many processes, where a worker is killed."""
    asked = {"rows": sft_rows(96), "training": {"batch_size": 4, "n_epochs": 4}}
    on_two = {"gpus": 0, "processes": 1, "nodes": 2, "executor": "ray"}
    folder = workshop.job("sft", "granitemoe", resources=on_two, **asked)
    office = Office(config_for(workshop.root, cluster))
    office.store.add(NewJob(folder.root.name, "ann", "sft", "some/model", str(folder.root), 0, None, "ray"))
    job_id = folder.root.name
    office.until(lambda: office.steps(job_id) >= 3)
    office.store.request_cancel(job_id, None)
    job = office.ended(job_id)
    (cancelled,) = Run(folder, 0).events("cancelled")
    assert (job.state, job.attempts) == (JobState.CANCELLED, 1), job.reason
    assert cancelled.step < 48
    log = folder.output.read_text()
    assert "fp32 on cpu, 2 processes)" in log
    assert "on Ray: 2 nodes" in log
    assert "[process 1] " in log, "of the other node"
    spec = json.loads(folder.spec.read_text())
    spec["resources"] |= {"nodes": 1, "processes": 2}
    folder.spec.write_text(json.dumps(spec))
    office.store.resume(job_id, None)
    office.until(lambda: len(Run(folder, 0).events("started")) == 2 and office.steps(job_id) > cancelled.step + 2)
    rank_0 = psutil.Process(Run(folder, 0).events("started")[1].pid)
    (rank_1,) = {child.pid for child in rank_0.parent().children()} - {rank_0.pid}
    os.kill(rank_1, signal.SIGKILL)
    job = office.ended(job_id)
    assert (job.state, job.attempts, job.lost) == (JobState.COMPLETED, 3, 1), job.reason
    assert "process 1 of 2 was killed by SIGKILL" in folder.output.read_text()
    run = Run(folder, 0)
    assert [event.step >= cancelled.step for event in run.events("resumed")] == [True, True]
    assert not run.events("failed"), "the other one's trace of it is no reason"
    alone = workshop.run("sft", "granitemoe", **{**asked, "training": {"batch_size": 8, "n_epochs": 4}})
    mine, theirs = run.final(), alone.final()
    assert mine.keys() == theirs.keys()
    apart = max(float((mine[name] - tensor).abs().max()) for name, tensor in theirs.items())
    assert apart < ATOL
    wait_for(lambda: not with_environment("MOE_JOB_FOLDER", str(folder.root)))
    office.store.close()


def test_a_head_that_was_restarted_loses_no_job(cluster: Cluster) -> None:
    """Until the head answers, the job counts as running; then it counts as lost, and is resumed."""
    with job_folders() as root:
        office = Office(config_for(root, cluster, tiny_python(root)))
        office.submit("job", **LONG)
        office.until(lambda: office.steps("job") > 2)
        before = office.job("job")
        cluster.kill()
        (Path(before.folder) / "child.json").write_text("{}")
        until = time.monotonic() + 2
        office.until(lambda: time.monotonic() > until)
        assert office.job("job") == before
        cluster.start()
        job = office.ended("job")
        assert (job.state, job.attempts, job.lost) == (JobState.COMPLETED, 2, 1), job.reason
        assert job.run != before.run
        assert len((Path(job.folder) / "launches").read_text().split()) == 2
        office.store.close()


# Without a cluster.


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    office = Office(config_for(tmp_path, address, unreachable_s=0.3))
    office.submit("job")
    office.supervisor.step()
    assert (office.job("job").state, office.job("job").run) == (JobState.IN_PROGRESS, None), "it may yet answer"
    job = office.ended("job")
    assert job.state is JobState.FAILED
    assert f"the Ray cluster at {address} (`executors.ray.address`) can't be reached: ConnectError" in str(job.reason)
    assert "waits for up to 0.3 s: the Ray cluster" in (Path(job.folder) / "output.log").read_text()
    local = ProviderConfig(state_dir=tmp_path)
    office.submit("later")
    office.supervisor = new_supervisor(office.store, local)
    assert "has no `executors.ray`" in str(office.ended("later").reason)
    office.store.close()


def test_where_a_job_runs_is_decided_at_the_door(tmp_path: Path) -> None:
    ray = {"address": "http://head:8265"}
    with serving_in_process(tmp_path, executors={"default": "ray", "ray": ray}) as service:
        job = service.store.get(submit(service, resources={"nodes": 2, "gpus": 8}), None)
        assert (job.executor, job.gpus) == ("ray", 0), "none of this machine's devices"
        resources = JobFolder(Path(job.folder)).read_spec().resources
        assert (resources.executor, resources.nodes, resources.ranks) == ("ray", 2, 16)
        job = service.store.get(submit(service, resources={"executor": "local", "gpus": 2}), None)
        assert (job.executor, job.gpus) == (None, 2)
        with pytest.raises(InvalidInput, match="nodes: 2 is not valid with executor 'local'"):
            submit(service, resources={"executor": "local", "nodes": 2})
        with pytest.raises(InvalidInput, match=r"loader: .*'hf', because the nodes of a Ray cluster"):
            submit(service, loader="unsloth", adapter={})
    with serving_in_process(tmp_path) as service:
        with pytest.raises(InvalidInput, match=r"resources.executor: .*has no Ray cluster \(`executors.ray`\)"):
            submit(service, resources={"executor": "ray"})
        with pytest.raises(InvalidInput, match=r"resources.nodes: .*expected 1, because executor 'local'"):
            submit(service, resources={"nodes": 2})


def test_a_run_that_was_replaced_ends_and_a_folder_that_is_not_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(actor, "SHARED_S", 0.0)
    here = Node("127.0.0.1")
    assert "127.0.0.1 does not see it" in str(here.sees(str(tmp_path), "job-1-a"))
    assert "`state_dir` has to be a path that every node" in str(here.sees(str(tmp_path), "job-1-a"))
    assert group.main([str(tmp_path), "job-1-a"]) == FAILED
    assert "does not see" in capsys.readouterr().err
    mine = ClusterRun(run="job-1-a", number=1)
    mine.write(tmp_path)
    assert (tmp_path / RUN_FILE).stat().st_mode & 0o077 == 0, "it may hold a token"
    assert here.sees(str(tmp_path), mine.run) is None
    assert wished_signal(tmp_path, mine.run) is None
    mine.model_copy(update={"wish": "stop"}).write(tmp_path)
    assert wished_signal(tmp_path, mine.run) is signal.SIGTERM
    ClusterRun(run="job-2-b", number=2).write(tmp_path)
    assert wished_signal(tmp_path, mine.run) is signal.SIGKILL
    assert "finds another run" in str(here.sees(str(tmp_path), mine.run))
    assert group.main([str(tmp_path), mine.run]) == FAILED
    assert "was replaced by job-2-b" in capsys.readouterr().err


def test_a_nodes_processes_get_its_own_environment_and_what_was_decided() -> None:
    own = {"PATH": "/node/bin", "HF_HOME": "/node/hf", "CUDA_VISIBLE_DEVICES": "3"}
    of_ray = {"RAY_X": "1", "OMP_NUM_THREADS": "16"}
    wanted = ClusterRun(run="a", number=1, environment={"HF_HOME": "/server", "HF_TOKEN": "t"}, cpus_per_process=2,
                        overrides={"NCCL_DEBUG": "INFO"})  # fmt: skip
    expected = {"PATH": "/node/bin", "HF_HOME": "/node/hf", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO",
                "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "3"}  # fmt: skip
    assert environment(own | of_ray, wanted, gpus=1) == expected
    assert environment(own | of_ray, wanted, gpus=0) == expected | {"CUDA_VISIBLE_DEVICES": ""}
