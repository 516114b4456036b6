"""Helper processes that prepare batches: they are forked from a process with one thread, and survive a SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.worker.main import COMPLETED, STOPPED
from llama_stack_provider_moe.control.supervisor.processes import in_session
from llama_stack_provider_moe.jobdir.checkpoint_index import valid_checkpoints
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder
from tests.support.chosen import few
from tests.support.jobs_support import wait_for
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

ROOT = Path(__file__).parents[3]


def start(folder: JobFolder) -> "subprocess.Popen[bytes]":
    """The job in its own process and session, as an executor starts it."""
    with folder.output.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.main", str(folder.root)],
            cwd=folder.root, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def assert_nothing_is_left(session: int) -> None:
    """Without a supervisor, which would kill what a job leaves."""
    try:
        wait_for(lambda: not in_session(session), timeout_s=60)
    finally:
        for pid in in_session(session):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("recipe", few(["dpo", "circuit_breaker"], 1))
def test_batches_are_the_same_whoever_prepares_them(workshop: Workshop, recipe: str) -> None:
    settings: dict[str, Any] = {"training": {"batch_size": 4}}
    alone = workshop.run(recipe, "granitemoe", **settings)
    folder = workshop.job(recipe, "granitemoe", **settings, options={"dataloader_workers": 2})
    process = start(folder)
    assert process.wait(600) == COMPLETED, folder.output.read_text()
    assert_nothing_is_left(process.pid)
    helped = Run(folder, COMPLETED)
    assert helped.steps("loss") == alone.steps("loss")
    assert helped.held_out("validation_loss") == alone.held_out("validation_loss")
    assert "multi-threaded" not in folder.output.read_text(), "Python would warn of a fork in a process with threads"


@pytest.mark.wide
def test_a_job_with_workers_saves_when_it_is_cancelled(workshop: Workshop) -> None:
    """The signal goes to all processes of the job; the workers must not end before the step is done."""
    settings: dict[str, Any] = {"training": {"n_epochs": 1000, "batch_size": 4}, "options": {"dataloader_workers": 2}}
    folder = workshop.job("sft", "granitemoe", **settings)
    process = start(folder)
    try:
        wait_for(
            lambda: (
                process.poll() is not None or any(e.type == "step" and e.step > 2 for e in read(folder.events).events)
            )
        )
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(300) == STOPPED, folder.output.read_text()
        assert_nothing_is_left(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert valid_checkpoints(folder, folder.read_spec())
