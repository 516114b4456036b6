"""Suspend supervisors at every point of a job's life while another one takes over: real processes, tiny children."""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.processes import ProcessName
from llama_stack_provider_moe.control.supervisor.starting import ensure_supervisor
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.jobs_support import new_job, tiny_config, wait_for, wait_until_ended
from tests.support.pausing_supervisor import POINTS

SEED = 20261128
LIMIT_S = 600.0


def state_of(pid: int) -> str:
    """The state of a process as in proc_pid_stat(5): T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def pauses(root: Path, rounds: int, say: Callable[[str], None]) -> None:
    """Make `rounds` pauses; AssertionError if a job was lost, or two processes worked on one job."""
    config = tiny_config(root, lease_s=2, idle_exit_s=0.5, poll_s=0.1)
    store, chance, done = JobStore(config.url), random.Random(SEED), Counter[str]()
    try:
        for number in range(rounds):
            point = list(POINTS)[number % len(POINTS)]
            is_lost = number // len(POINTS) % 2 == 0  # the job's first process dies; otherwise it completes
            told = one(store, config, f"job-{number}", point, is_lost, chance)
            done[point] += 1
            say(f"round {number + 1}: paused {point!r}, {told}")
        completed = store.counts()[JobState.COMPLETED]
        assert completed == len(store.list(None)) == rounds
        say(f"{rounds} pauses, {dict(done)}; {completed} jobs completed once, 0 lost, 0 with two processes at a time")
    finally:
        store.close()


def one(store: JobStore, config: ProviderConfig, job_id: str, point: str, is_lost: bool, chance: random.Random) -> str:
    """Run one job with one pause; returns what happened."""
    folder = JobFolder(new_job(store, config, job_id, steps=20, step_s=0.05, alone=True, killed=int(is_lost)))
    mark = config.state_dir / f"{job_id}.paused"
    with (config.state_dir / "paused.log").open("ab") as log:
        paused = subprocess.Popen(
            [sys.executable, "-m", "tests.support.pausing_supervisor", point, str(mark)],
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        assert paused.stdin is not None
        with paused.stdin:
            paused.stdin.write(config.model_dump_json().encode())
        wait_for(lambda: paused.poll() is not None or (mark.exists() and state_of(paused.pid) == "T"), LIMIT_S)
        assert paused.poll() is None, f"it ended before {point!r}: {(config.state_dir / 'paused.log').read_text()}"
        if point == "in the transaction":  # no other supervisor can take over before this
            time.sleep(3)
            heir = "nobody"
        else:
            heir = taken_over(store, config, paused.pid)
            if chance.random() < 0.7:  # otherwise immediately
                moved_on(store, job_id, chance.uniform(0, 1))
        at = store.get(job_id, None)
        paused.send_signal(signal.SIGCONT)
        job = wait_until_ended(store, job_id, LIMIT_S)
        paused.wait(LIMIT_S)
        assert paused.returncode == 0
    finally:
        paused.kill()
        paused.wait()
        wait_for(lambda: has_left(store), LIMIT_S)
    assert (job.state, job.attempts, job.lost) == (JobState.COMPLETED, 1 + is_lost, int(is_lost)), job.reason
    assert not (folder.root / "two").exists(), "two processes worked at one job"
    assert len((folder.root / "launches").read_text().split()) == job.attempts
    events = read(folder.events).events
    assert [event.type for event in events].count("started") == job.attempts
    assert [event.step for event in events if event.type == "step"] == [1] * is_lost + list(range(1, 21))
    return f"went on at {at.state.value}, attempt {at.attempts}, {heir} having taken over; {job_id} {job.state.value}"


def has_left(store: JobStore) -> bool:
    """Whether the last supervisor's process is gone. A lease that ran out on a busy machine may be held again."""
    holder = store.last_supervisor()
    name = None if holder is None else ProcessName.parse(holder.id)
    return store.live_supervisor() is None and (name is None or name.has_ended())


def moved_on(store: JobStore, job_id: str, more_s: float) -> None:
    """Wait until the other supervisor has changed the job, and a little longer."""
    before = store.get(job_id, None)
    until = time.monotonic() + 5  # at some points it has nothing left to do
    while time.monotonic() < until and store.get(job_id, None) == before:
        time.sleep(0.05)
    time.sleep(more_s)


def taken_over(store: JobStore, config: ProviderConfig, pid: int) -> str:
    """Wait until another supervisor has the lease, as a server would arrange it."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        live = store.live_supervisor()
        if live is not None and live.pid != pid:
            return "another supervisor"
        if live is None:
            ensure_supervisor(config, store)
        time.sleep(0.1)
    raise AssertionError("nobody took over")
