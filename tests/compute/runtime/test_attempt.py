"""Laws of a training whose attempt was replaced: all its processes end by themselves and write nothing more."""

import os
import stat
from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.control.supervisor.processes import birth
from llama_stack_provider_moe.jobdir.attempt import Attempt, read_attempt
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from tests.support.jobs_support import wait_for
from tests.support.together import LIMIT_S, office
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A common umask."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def checkpoints_in(folder: JobFolder) -> set[str]:
    return {path.name for path in (folder.root / "checkpoints").iterdir() if path.name[0] != "."}


@pytest.mark.usefixtures("open_umask")
def test_all_processes_of_a_replaced_attempt_end_and_write_nothing_more(workshop: Workshop) -> None:
    folder = workshop.job(
        "sft", "granitemoe", resources={"gpus": 0, "processes": 2},
        training={"n_epochs": 500, "batch_size": 4}, options={"autosave_minutes": 1e-6, "eval_before_training": False},
    )  # fmt: skip
    with office(workshop) as desk:
        desk.submit(folder)
        job = desk.after_steps(folder, 2)
        pids = [job.pid, *desk.ranks(folder).values()]
        assert read_attempt(folder.root) == Attempt(number=1, name=job.attempt)
        write_atomic(folder.attempt, Attempt(number=2, name="2@now"))  # as another supervisor does
        events, saved = len(read(folder.events).events), checkpoints_in(folder)
        wait_for(lambda: all(pid is None or birth(pid) is None for pid in pids), LIMIT_S)
    # Each process may be in the middle of one write, which was checked just before. Hundreds of steps would follow.
    assert len(read(folder.events).events) - events <= 2
    assert len(checkpoints_in(folder) - saved) <= 1
    assert not folder.manifest.exists()
    written = [folder.events, folder.resolved, folder.root / "checkpoints", *(folder.root / "checkpoints").rglob("*")]
    assert any(path.suffix == ".safetensors" for path in written)
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == [], "others can read them"
    assert "attempt 1 of the job and no longer counts: attempt 2 replaced it" in folder.output.read_text()
