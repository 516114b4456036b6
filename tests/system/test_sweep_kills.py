"""A sweep of eight real jobs on two processes, while server and supervisor are killed: ranked right, nothing lost."""

import os
import signal
from pathlib import Path

import pytest

from llama_stack_provider_moe.jobdir.events import Evaluation
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.scan import scan
from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, run_config, stop_jobs
from tests.support.jobs_support import job_folders
from tests.system.test_chaos import Arena, pid_of, until

pytestmark = pytest.mark.e2e

LIMIT_S = 800.0
PARAMETERS = {"optimizer.lr": [1e-4, 3e-3, 1e-2, 3e-2], "adapter.rank": [2, 4]}


def create(arena: Arena) -> list[str]:
    job = {
        "recipe": "sft", "model": str(arena.provider.models_dir / "granitemoe"), "data": {"dataset_id": "words"},
        "training": {"n_epochs": 2, "batch_size": 1, "max_steps_per_epoch": 4, "dtype": "fp32"},
        "options": {"max_length": 64, "validation_split": 0.25},
    }  # fmt: skip
    body = {"job": job, "parameters": PARAMETERS, "sweep_uuid": "kills", "max_parallel": 2}
    made: list[str] = arena.ask("POST", "/sweeps", json=body)["jobs"]
    return made


def ended(arena: Arena) -> int:
    found = arena.ask("GET", "/sweeps/kills")
    return 0 if found is None else sum(found["jobs"].get(state, 0) for state in ("completed", "failed", "cancelled"))


def last_figure(arena: Arena, job_id: str) -> float:
    """From the job's own events, which the ranking must agree with."""
    events = JobFolder(arena.provider.jobs_dir / job_id).events
    return list(scan(events, Evaluation))[-1].metrics["validation_loss"]


@pytest.mark.wide
def test_a_sweep_survives_kills_of_server_and_supervisor() -> None:
    with job_folders() as folder:
        check(folder)


def check(folder: Path) -> None:
    config = run_config(
        QUICKSTART,
        folder,
        provider={
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"poll_s": 0.2, "lease_s": 4, "idle_exit_s": 30, "max_concurrent_jobs": 2},
        },
    )
    arena = Arena(folder, config)
    tiny_models.build("granitemoe", arena.provider.models_dir / "granitemoe")
    try:
        arena.start()
        arena.register()
        names = create(arena)
        until(lambda: ended(arena) >= 2, "two jobs end", LIMIT_S)
        supervisor = pid_of(arena, "supervisor")
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)
        until(lambda: ended(arena) >= 4, "four jobs end", LIMIT_S)
        arena.kill()
        supervisor = pid_of(arena, "supervisor")
        assert supervisor is not None
        os.kill(supervisor, signal.SIGKILL)  # now nobody is left but the children
        arena.start()
        until(lambda: ended(arena) == 8, "all jobs end", LIMIT_S)
        until(
            lambda: all(job["rank"] for job in arena.ask("GET", "/sweeps/kills")["data"]),
            "the last figures are read",
            60,
        )
        found = arena.ask("GET", "/sweeps/kills")
        assert (found["status"], found["jobs"]) == ("completed", {"completed": 8})
        figures = {name: last_figure(arena, name) for name in names}
        assert [job["job_uuid"] for job in found["data"]] == sorted(names, key=lambda name: figures[name])
        assert {job["job_uuid"]: job["figure"] for job in found["data"]} == figures
        assert len(set(figures.values())) == 8, "or the order would prove nothing"
        assert [job["evaluations"] for job in found["data"]] == [2] * 8
        assert found["best"] == found["data"][0]["job_uuid"]
        details = [arena.ask("GET", f"/jobs/{name}") for name in names]
        assert [each["resources_allocated"]["lost"] for each in details] == [0] * 8, "children outlive the others"
        assert [each["attempts"] for each in details] == [1] * 8
        assert all(JobFolder(arena.provider.jobs_dir / name).read_manifest() is not None for name in names)
    finally:
        if arena.process is not None:
            arena.kill()
        stop_jobs(arena.provider)
