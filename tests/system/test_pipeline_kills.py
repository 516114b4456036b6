"""A pipeline over HTTP whose server, supervisor and training processes are killed in each part: each ends once."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.processes import is_alive
from llama_stack_provider_moe.ground.small_files import read_config
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support import tiny_models
from tests.support.host_harness import QUICKSTART, run_config, stop_jobs
from tests.support.jobs_support import job_folders
from tests.system.test_chaos import Arena, pid_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LIMIT_S = 3000.0
TRAINING = {
    "recipe": "sft", "data": {"dataset_id": "words"}, "options": {"max_length": 64, "autosave_minutes": 1e-6},
    "training": {"n_epochs": 1, "batch_size": 1, "max_steps_per_epoch": 12, "dtype": "fp32"}, "optimizer": {"lr": 1e-3},
}  # fmt: skip
NAMES = ("math", "code", "mix", "routers", "prune", "look")


def parts(model: str) -> list[dict[str, Any]]:
    branches = [{"name": "math", "model": "parts.math/merged"}, {"name": "code", "model": "parts.code"}]
    adapter = {"rank": 2, "plan": "all_experts", "router_rank": 2}
    jobs: dict[str, dict[str, Any]] = {
        "math": TRAINING | {"model": model, "adapter": {"rank": 2}, "export": {"merged": True}},
        "code": TRAINING | {"model": model, "adapter": None},
        "mix": {"recipe": "mix", "model": model, "method": "btx", "branches": branches},
        "routers": TRAINING | {"model": "parts.mix", "adapter": adapter, "moe": {"train_router": True}},
        "prune": {"recipe": "surgery", "model": "parts.mix", "surgery": {"action": "split", "factor": 2}},
        "look": {"recipe": "routing_analysis", "model": "parts.routers/adapter",
                 "data": {"sets": {"a": "words", "b": "words"}}},
    }  # fmt: skip
    return [{"name": name, "job": jobs[name]} for name in NAMES]


def at_work(store: JobStore, struck: set[str]) -> dict[str, int]:
    """The pids of jobs that were not killed yet, once one of them has begun its work: taken a step, if it trains."""
    alive, begun = {}, False
    for job in store.running():
        if job.id in struck or not job.pid or not job.pid_birth or not is_alive(job.pid, job.pid_birth):
            continue
        wanted = "step" if job.recipe == "sft" else "started"
        begun |= any(event.type == wanted for event in read(JobFolder(Path(job.folder)).events).events)
        alive[job.id] = job.pid
    return alive if begun else {}


def strike(arena: Arena, pids: list[int]) -> None:
    """Kill processes of jobs, the supervisor and the server, and start the server again."""
    supervisor = pid_of(arena, "supervisor")
    arena.kill()
    for pid in (supervisor, *pids):
        with suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
    arena.start()


def test_a_pipeline_survives_kills_in_each_part() -> None:
    with job_folders() as folder:
        check(folder)


def check(folder: Path) -> None:
    config = run_config(
        QUICKSTART,
        folder,
        provider={
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"poll_s": 0.1, "lease_s": 4, "idle_exit_s": 30, "max_concurrent_jobs": 2},
        },
    )
    arena = Arena(folder, config)
    model = tiny_models.build("llama", arena.provider.models_dir / "llama")
    try:
        arena.start()
        arena.register()
        made = arena.ask("POST", "/pipelines", json={"pipeline_uuid": "kills", "parts": parts(str(model))})
        struck: set[str] = set()
        store = JobStore(arena.provider.url)
        deadline = time.monotonic() + LIMIT_S
        while not store.pipelines.get("kills", None).found.state.over:
            assert time.monotonic() < deadline, "the pipeline ends"
            if working := at_work(store, struck):
                struck.update(working)
                strike(arena, list(working.values()))
            time.sleep(0.02)
        store.close()
        found = arena.ask("GET", "/pipelines/kills")
        assert found["status"] == "completed", found
        assert found["jobs"] == {"completed": len(NAMES) + 1}, "the parts and one export"
        (export,) = found["parts"][0]["exports"]
        jobs = [*made["jobs"].values(), export["job_uuid"]]
        assert struck == set(jobs)
        details = {job_id: arena.ask("GET", f"/jobs/{job_id}") for job_id in jobs}
        for job_id, detail in details.items():
            assert (detail["attempts"], detail["resources_allocated"]["lost"]) == (2, 1), detail
            assert JobFolder(arena.provider.jobs_dir / job_id).read_manifest() is not None
        ends = {name: details[f"kills-{name}"]["completed_at"] for name in NAMES}
        starts = {name: details[f"kills-{name}"]["started_at"] for name in NAMES}
        assert max(ends["math"], ends["code"], details[export["job_uuid"]]["completed_at"]) <= starts["mix"]
        assert ends["mix"] <= min(starts["routers"], starts["prune"])
        assert ends["routers"] <= starts["look"]
        experts = {name: read_config(JobFolder(arena.provider.jobs_dir / f"kills-{name}").model / "config.json")
                   for name in ("mix", "prune")}  # fmt: skip
        assert [each["num_local_experts"] for each in experts.values()] == [2, 4]
    finally:
        if arena.process is not None:
            arena.kill()
        stop_jobs(arena.provider)
