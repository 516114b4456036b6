"""A supervisor has the names of waiting jobs resolved by a process of its own, and fails those that never will run."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server.late_names import resolved
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.control.supervisor import late_resolution
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor
from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.server.test_allowed_paths import CAUSAL, model_at
from tests.control.server.test_model_names import leave
from tests.support.host_support import BODY, ask, folder_of, serving_in_process, submit
from tests.support.jobs_support import job_folders, new_supervisor, tiny_config, wait_for

WHOLE = {"adapter": None}


@pytest.fixture
def service() -> Iterator[PostTrainingService]:
    with job_folders() as folder, serving_in_process(folder) as made:
        yield made


def supervisor_of(service: PostTrainingService) -> Supervisor:
    """A supervisor whose training processes are tiny children."""
    tiny = tiny_config(service.config.state_dir, max_concurrent_jobs=2)
    changes = {"training_python": tiny.training_python, "supervisor": tiny.supervisor}
    return new_supervisor(service.store, service.config.model_copy(update=changes))


def complete(service: PostTrainingService, job_id: str) -> None:
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, JobState.COMPLETED, artifacts=(leave(service, job_id, "model"),))


def waiting(service: PostTrainingService) -> tuple[str, str]:
    first = submit(service, **WHOLE)
    second = submit(service, model=first, adapter={})
    (folder_of(service, second).root / "child.json").write_text("{}")
    return first, second


def ended(service: PostTrainingService, supervisor: Supervisor, job_id: str) -> Job:
    def look() -> Job | None:
        supervisor.step()
        job = service.store.get(job_id, None)
        return job if job.state.ended else None

    found = wait_for(look)
    assert found is not None
    return found


def test_a_job_starts_once_the_one_that_it_waits_for_has_completed(service: PostTrainingService) -> None:
    first, second = waiting(service)
    complete(service, first)
    job = ended(service, supervisor_of(service), second)
    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
    assert folder_of(service, second).read_spec().model == str(folder_of(service, first).model)
    assert [each.id for each in service.store.dependents(first)] == [second], "an adapter needs its base"


def test_a_job_that_can_not_use_what_was_left_fails_with_the_words_of_the_door(service: PostTrainingService) -> None:
    first, second = waiting(service)
    complete(service, first)
    (folder_of(service, first).model / "config.json").unlink()
    job = ended(service, supervisor_of(service), second)
    assert (job.state, job.attempts) == (JobState.FAILED, 0)
    assert job.reason is not None
    assert job.reason.startswith(f"model: {first!r} is not valid; expected a folder with a readable config.json")


def test_failures_go_down_the_chain(service: PostTrainingService) -> None:
    first, second = waiting(service)
    third = submit(service, model=second, adapter={})
    service.store.request_cancel(first, None)
    supervisor = supervisor_of(service)
    job = ended(service, supervisor, third)
    assert job.state is JobState.FAILED
    assert job.reason == (
        f"job {second!r}, which it waits for, failed: job {first!r}, which it waits for, was cancelled: cancelled "
        "before it started"
    )


def test_a_resolution_that_dies_is_tried_again_a_few_times(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = waiting(service)
    complete(service, first)
    monkeypatch.setattr(late_resolution, "MODULE", "no_such_module")
    job = ended(service, supervisor_of(service), second)
    assert job.state is JobState.FAILED
    assert job.reason is not None
    assert job.reason.startswith("its names could not be resolved in 3 tries; the last one ended with exit code 1: ")
    assert "no_such_module" in job.reason


def test_one_that_hangs_is_ended(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = waiting(service)
    complete(service, first)
    (tmp_path / "hanging.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(late_resolution, "MODULE", "hanging")
    monkeypatch.setattr(late_resolution, "LIMIT_S", 0.3)
    job = ended(service, supervisor_of(service), second)
    assert job.reason is not None
    assert "the last one ended with exit code -9" in job.reason


def test_the_next_supervisor_repeats_a_resolution_that_nobody_recorded(service: PostTrainingService) -> None:
    first, second = waiting(service)
    complete(service, first)
    resolved(service.store, service.config, second)  # by a supervisor that dies then
    assert service.store.waits.due().ready, "the store does not know it yet"
    job = ended(service, supervisor_of(service), second)
    assert job.state is JobState.COMPLETED


def test_a_job_that_was_cancelled_meanwhile_stays_cancelled(service: PostTrainingService) -> None:
    first, second = waiting(service)
    complete(service, first)
    supervisor = supervisor_of(service)
    supervisor.step()
    service.store.request_cancel(second, None)
    wait_for(lambda: folder_of(service, second).read_spec().model != f"{first}/model")
    supervisor.step()
    assert service.store.get(second, None).state is JobState.CANCELLED
    service.store.resume(second, None)
    assert ended(service, supervisor, second).state is JobState.COMPLETED


def test_a_pipeline_whose_children_die_once_each_runs_every_part_to_its_end(service: PostTrainingService) -> None:
    names = ("a", "b")
    jobs = {"a": BODY | WHOLE, "b": BODY | {"model": "parts.a"}}
    parts = [{"name": name, "job": job} for name, job in jobs.items()]
    made = ask(service, "POST", "/pipelines", json={"pipeline_uuid": "p", "parts": parts})
    assert made.status_code == 200, made.text
    for name in names:
        folder = folder_of(service, f"p-{name}")
        (folder.root / "child.json").write_text(json.dumps({"killed": 1}))
        model_at(folder.root / "left", CAUSAL)
    supervisor = supervisor_of(service)
    wait_for(lambda: not supervisor.step() and service.store.pipelines.get("p", None).found.state.ended)
    found = ask(service, "GET", "/pipelines/p").json()
    assert found["status"] == "completed", found
    assert [(part["name"], part["status"], part["attempts"]) for part in found["parts"]] == [
        (name, "completed", 2) for name in names
    ]
    assert all(one["completed_at"] <= two["started_at"] for one, two in itertools.pairwise(found["parts"]))
