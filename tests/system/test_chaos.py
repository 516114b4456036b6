"""Processes are killed and suspended at random; every job completes as if nothing had happened.

Kills: real server, real supervisor and forkserver, real training of a tiny Mixture-of-Experts model. Pauses (`pauses`):
real supervisors, one of them suspended at each point between its claim of a job and its settling, over tiny training
processes. `make test` runs few rounds of kills, each of which may cost the imports of torch and TRL, and a pause at
each point. `python -m tests.system.test_chaos 30` runs 30 rounds of both and prints what happened; `... 30 pauses` or
`... 30 chaos`, of one of them.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.processes import ProcessName, birth, is_alive, with_environment
from llama_stack_provider_moe.jobdir.checkpoint_index import valid_checkpoints, verify
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support import tiny_models
from tests.support.free_ports import free_port
from tests.support.host_harness import API, QUICKSTART, run_config, stop_jobs
from tests.support.jobs_support import job_folders
from tests.support.pauses import pauses
from tests.support.pausing_supervisor import POINTS

pytestmark = pytest.mark.e2e

ROUNDS = 4  # each victim once
SEED = 20251121
STEPS, EPOCHS = 16, 2
LIMIT_S = 800.0
VICTIMS = ("child", "supervisor", "server", "suspended supervisor")
TIMED = ("tokens_per_s", "tokens_per_s_per_device", "tflops_per_device", "memory_bytes")
ROWS = [
    {"prompt": f"Write a word about {a} and {b}.", "completion": "The capital of France is Paris."}
    for a in ("garden", "letter", "friend", "spring") for b in ("answer", "France", "Paris", "token")
]  # fmt: skip


@dataclass
class Arena:
    """A server that can be killed and restarted, on one port and one state folder."""

    folder: Path
    config: Path
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def provider(self) -> ProviderConfig:
        return ProviderConfig(state_dir=self.folder / "state")

    def start(self) -> None:
        self.provider.state_dir.mkdir(exist_ok=True)
        with (self.folder / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).parent / "llama", "stack", "run", str(self.config), "--port", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "MOE_STATE_DIR": str(self.provider.state_dir)},
            )  # fmt: skip
        until(lambda: self.ask("GET", "/health") is not None, "the server answers")

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The JSON answer; None if there is none, or the server says "try again": after a kill on a busy machine."""
        try:
            answer = httpx.request(method, f"http://127.0.0.1:{self.port}{API}{path}", timeout=60, **more)
        except httpx.TransportError:
            return None
        if answer.status_code == 503:
            return None
        assert answer.status_code < 300, answer.text
        return answer.json()

    def register(self) -> None:
        body = {"dataset_id": "words", "purpose": "post-training/messages", "source": {"type": "rows", "rows": ROWS}}
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1beta/datasets", json=body, timeout=60)
        assert answer.status_code == 200, answer.text

    def submit(self, job_id: str) -> None:
        body = {
            "recipe": "sft", "job_uuid": job_id, "model": str(self.provider.models_dir / "granitemoe"),
            "data": {"dataset_id": "words"},
            "training": {"n_epochs": EPOCHS, "batch_size": 1, "max_steps_per_epoch": STEPS // EPOCHS, "dtype": "fp32"},
            "optimizer": {"lr": 5e-3},
            # Dropout draws from the random state at every step: a state that is restored wrongly shows at once.
            "adapter": {"rank": 4, "alpha": 8},
            "moe": {"train_router": True, "expert_dropout": 0.1},
            # A checkpoint a step, so that a start gets further than the one before, however soon it is killed.
            "options": {"max_length": 64, "autosave_minutes": 1e-6},
        }  # fmt: skip
        until(lambda: self.ask("POST", "/jobs", json=body), f"{job_id} is accepted")

    def ended(self, job_id: str) -> dict[str, Any] | None:
        job = self.ask("GET", f"/jobs/{job_id}")
        if job is None or job["status"] in ("scheduled", "in_progress"):
            return None
        assert job["status"] == "completed", f"{job_id}: {job['status']}: {job['reason']}"
        return dict(job)


def until[T](found: Callable[[], T | bool | None], what: str, limit_s: float = LIMIT_S) -> T:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = found()
        if value is not None and value is not False:
            return value  # type: ignore[return-value]
        time.sleep(0.2)
    raise AssertionError(f"not within {limit_s:g} s: {what}")


def pid_of(arena: Arena, victim: str) -> int | None:
    """The victim's current process; None if there is none."""
    store = JobStore(arena.provider.url)
    try:
        if victim == "child":
            jobs = store.running()
            pids = [job.pid for job in jobs if job.pid and job.pid_birth and is_alive(job.pid, job.pid_birth)]
            return pids[0] if pids else None
        holder = store.live_supervisor()
        name = None if holder is None else ProcessName.parse(holder.id)
        return None if name is None or name.has_ended() else name.pid
    finally:
        store.close()


def steps_taken(folder: JobFolder) -> int:
    return sum(event.type == "step" for event in read(folder.events).events)


def curve(folder: JobFolder) -> dict[int, dict[str, float]]:
    """Step -> its metrics as last written, without times and memory."""
    return {
        event.step: {name: value for name, value in event.metrics.items() if name not in TIMED}
        for event in read(folder.events).events
        if event.type == "step"
    }


def strike(arena: Arena, job_id: str, victim: str, chance: random.Random) -> bool:
    """Kill after some more steps of the job (or sometimes anywhere); return False if the job ended first."""
    folder = JobFolder(arena.provider.jobs_dir / job_id)
    goal = steps_taken(folder) + chance.randint(0, 3)
    until(lambda: steps_taken(folder) >= goal or arena.ended(job_id) is not None, f"{goal} steps of {job_id}")
    time.sleep(chance.uniform(0, 0.4))
    if arena.ended(job_id) is not None:
        return False
    if victim == "server":
        arena.kill()
        arena.start()
        return True
    if victim == "suspended supervisor":
        return suspend(arena, job_id)
    pid = pid_of(arena, victim)
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended just now
        return False
    return True


def suspend(arena: Arena, job_id: str) -> bool:
    """Suspend the supervisor and kill its child; continue it once another one has taken over and restarted the job."""
    supervisor, child = pid_of(arena, "supervisor"), pid_of(arena, "child")
    if supervisor is None or child is None:
        return False
    folder = JobFolder(arena.provider.jobs_dir / job_id)
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(child, signal.SIGKILL)
        before = steps_taken(folder)
        until(lambda: pid_of(arena, "supervisor") not in (None, supervisor), "another supervisor takes over")
        until(lambda: steps_taken(folder) > before or arena.ended(job_id) is not None, f"{job_id} goes on")
    except ProcessLookupError:  # it has ended just now
        return False
    finally:
        os.kill(supervisor, signal.SIGCONT)
    until(lambda: birth(supervisor) is None, "the suspended supervisor leaves")
    return True


def chaos(folder: Path, rounds: int, say: Callable[[str], None]) -> None:
    """Do `rounds` kills; AssertionError if a job was lost, done twice, or differs from the uninterrupted one."""
    config = run_config(
        QUICKSTART,
        folder,
        provider={
            "child_env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            "supervisor": {"poll_s": 0.2, "lease_s": 4, "idle_exit_s": 30, "max_attempts": 100},
        },
    )
    arena, chance, kills = Arena(folder, config), random.Random(SEED), Counter[str]()
    tiny_models.build("granitemoe", arena.provider.models_dir / "granitemoe")
    jobs = ["unbroken"]
    try:
        arena.start()
        arena.register()
        arena.submit("unbroken")
        until(lambda: arena.ended("unbroken"), "the unbroken job ends")
        while sum(kills.values()) < rounds:
            jobs.append(f"job-{len(jobs)}")
            arena.submit(jobs[-1])
            while sum(kills.values()) < rounds and arena.ended(jobs[-1]) is None:
                victim = VICTIMS[sum(kills.values()) % len(VICTIMS)]
                if strike(arena, jobs[-1], victim, chance):
                    kills[victim] += 1
                    say(f"round {sum(kills.values())}: {victim} killed, {jobs[-1]}")
        ends = {job: until(lambda job=job: arena.ended(job), f"{job} ends") for job in jobs}  # type: ignore[misc]
        check(arena, jobs)
        lost = sum(end["resources_allocated"]["lost"] for end in ends.values())
        say(f"{rounds} rounds, {dict(kills)}; {len(jobs)} jobs completed, {lost} processes lost, 0 jobs lost")
    finally:
        if arena.process is not None:
            arena.kill()
        stop_jobs(arena.provider)
    left = with_environment("MOE_STATE_DIR", str(arena.provider.state_dir))
    assert not left, f"processes left: {left}"


def check(arena: Arena, jobs: list[str]) -> None:
    """Every job completed once, and its result is bit-equal to the uninterrupted one."""
    unbroken = JobFolder(arena.provider.jobs_dir / jobs[0])
    wanted, weights = curve(unbroken), load_file(unbroken.adapter / "adapter_model.safetensors")
    assert list(wanted) == list(range(1, STEPS + 1))
    for job_id in jobs:
        folder = JobFolder(arena.provider.jobs_dir / job_id)
        manifest = folder.read_manifest()
        assert manifest is not None
        assert manifest.artifacts[-1].step == STEPS
        assert [each.kind for each in manifest.artifacts].count("adapter") == 1
        assert curve(folder) == wanted, job_id
        kept = [Path(each.path) for each in manifest.artifacts if each.kind == "checkpoint"]
        assert set(kept) <= set(valid_checkpoints(folder, folder.read_spec()))
        assert [verify(path) for path in kept] == [None] * len(kept)
        found = load_file(folder.adapter / "adapter_model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights), job_id


def test_nothing_is_lost_whatever_is_killed(tmp_path: Path) -> None:
    chaos(tmp_path, ROUNDS, print)


@pytest.mark.wide
def test_nothing_is_lost_or_done_twice_wherever_a_supervisor_is_suspended() -> None:
    with job_folders() as folder:
        pauses(folder, len(POINTS), print)


if __name__ == "__main__":
    for run in (pauses, chaos):
        if run.__name__ in sys.argv[2:] or not sys.argv[2:]:
            with job_folders() as temporary:
                run(temporary, int(sys.argv[1]), lambda text: print(text, flush=True))
