"""Real training processes that end before their first step; each job is then resumed and completes."""

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import NewJob
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.events import read
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.server_config import ProviderConfig, SupervisorConfig
from tests.support.chosen import few
from tests.support.host_support import Datasets
from tests.support.live_folders import contents
from tests.support.together import LIMIT_S, Office, office
from tests.support.training_support import Workshop, _write, sft_rows, workshop

__all__ = ["workshop"]
MANY = 12_000  # rows: seconds of tokenising
NOTHING_SAVED = (
    "cancelled before the first step; it saved no checkpoint, so it starts from the beginning when it is resumed"
)


@pytest.fixture(scope="module")
def desk(workshop: Workshop) -> Iterator[Office]:
    with office(workshop) as made:
        assert made.supervisor.acquire()
        yield made


@pytest.fixture(scope="module")
def service(workshop: Workshop, desk: Office) -> Iterator[PostTrainingService]:
    config = ProviderConfig(state_dir=workshop.root, supervisor=SupervisorConfig(start=False))
    made = PostTrainingService(config, {compat.Api.datasets: Datasets()})
    asyncio.run(made.initialize())
    yield made
    asyncio.run(made.shutdown())


def submitted(desk: Office, folder: JobFolder, recipe: str = "sft", parent: str | None = None) -> JobFolder:
    """Submit a job as the server does; its owner is the user without authentication."""
    desk.store.add(
        NewJob(folder.root.name, "anonymous", recipe, "some/model", str(folder.root), 0, parent)
    )  # fmt: skip
    return folder


def cancelled_once(desk: Office, folder: JobFolder, happened: Callable[[], bool]) -> str:
    """Cancel a job at a moment of its process's life; return the reason of its end."""
    until = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < until, folder.output.read_text()
        desk.supervisor.step()
        time.sleep(0.002)
    desk.cancel(folder)
    desk.ended(folder)
    job = desk.job(folder)
    assert (job.state, job.artifacts) == (JobState.CANCELLED, ())
    return str(job.reason)


def told(folder: JobFolder, kind: str) -> bool:
    return any(event.type == kind for event in read(folder.events).events)


def resumed_to_completion(service: PostTrainingService, desk: Office, folder: JobFolder) -> None:
    asyncio.run(service.resume(folder.root.name))
    run = desk.ended(folder)
    assert desk.job(folder).state is JobState.COMPLETED, run.reason
    assert [(each.step, each.checkpoint) for each in run.events("resumed")][-1:] == [(0, None)]


def long_job(workshop: Workshop) -> JobFolder:
    options = {"validation_split": 0, "lr_scheduler": "constant"}
    training = {"max_steps_per_epoch": 2, "batch_size": 2}
    data = {"validation_dataset_id": None}
    return workshop.job("sft", "llama", sft_rows(MANY), data=data, options=options, training=training)


@pytest.mark.parametrize("stage", few(["tokenising", "loading"], 1))
def test_a_job_cancelled_before_its_first_step_starts_again(
    workshop: Workshop, desk: Office, service: PostTrainingService, stage: str
) -> None:
    folder = submitted(desk, long_job(workshop))
    cache = folder.root / "cache"
    reached = {
        "loading": lambda: told(folder, "started"),
        "tokenising": lambda: any(content for _, content in contents(cache)),
    }
    assert cancelled_once(desk, folder, reached[stage]) == NOTHING_SAVED
    assert not told(folder, "plan"), "it was to be stopped earlier than this"
    resumed_to_completion(service, desk, folder)
    assert [event.step for event in read(folder.events).events if event.type == "step"] == [1, 2]


def test_a_job_that_failed_before_its_first_step_starts_again(
    workshop: Workshop, desk: Office, service: PostTrainingService
) -> None:
    folder = submitted(desk, workshop.job("sft", "llama"))
    kept = folder.train_rows.read_bytes()
    _write(folder.train_rows, [{"messages": []}])
    desk.ended(folder)
    assert desk.job(folder).state is JobState.FAILED
    assert not told(folder, "step")
    folder.train_rows.write_bytes(kept)
    resumed_to_completion(service, desk, folder)


@pytest.mark.wide
def test_an_analysis_that_was_cancelled_starts_again(
    workshop: Workshop, desk: Office, service: PostTrainingService
) -> None:
    body = {
        "recipe": "routing_analysis", "job_uuid": "analysis", "model": str(workshop.model("mixtral")),
        "data": {"sets": {"one": "a", "two": "b"}}, "training": {"dtype": "fp32", "batch_size": 4},
        "options": {"max_length": 64}, "analysis": {"permutations": 100, "resamples": 100},
    }  # fmt: skip
    folder = JobFolder(workshop.root / "jobs" / "analysis")
    folder.data.mkdir(parents=True)
    write_atomic(folder.spec, JOB_SPEC.validate_python(body))
    for part in ("set-one", "set-two"):
        _write(folder.rows(part), sft_rows(600))
    submitted(desk, folder, "routing_analysis")
    reason = cancelled_once(desk, folder, lambda: told(folder, "started"))
    assert reason == "cancelled before the report was written; a resumed analysis starts from the beginning"
    resumed_to_completion(service, desk, folder)


def test_an_export_that_was_cancelled_starts_again(
    workshop: Workshop, desk: Office, service: PostTrainingService
) -> None:
    parent = submitted(desk, workshop.job("sft", "llama"))
    desk.ended(parent)
    folder = JobFolder(workshop.root / "jobs" / "export")
    folder.root.mkdir()
    body = {
        "recipe": "export", "job_uuid": "export", "of": parent.root.name, "model": parent.read_spec().model,
        "export": {"merged": True, "load_check": False},
    }  # fmt: skip
    write_atomic(folder.spec, JOB_SPEC.validate_python(body))
    submitted(desk, folder, "export", parent.root.name)
    reason = cancelled_once(desk, folder, lambda: desk.job(folder).state is JobState.IN_PROGRESS)
    assert reason == "cancelled during the export; a resumed export keeps the completed steps"
    asyncio.run(service.resume("export"))
    desk.ended(folder)
    assert desk.job(folder).state is JobState.COMPLETED


def test_a_job_without_its_spec_is_not_resumed(workshop: Workshop, desk: Office, service: PostTrainingService) -> None:
    folder = submitted(desk, workshop.job("sft", "llama"))
    desk.cancel(folder)
    shutil.move(folder.spec, Path(f"{folder.spec}.gone"))
    with pytest.raises(Conflict, match=r"spec\.json is gone; submit it again"):
        asyncio.run(service.resume(folder.root.name))
