"""Tests the view of jobs that another version wrote: all are shown, and unreadable parts are named."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llama_stack_provider_moe.control.cli import show
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.supervisor.test_upgrade import MOMENT, artifact, line, spoil
from tests.support.host_support import ask, folder_of, serving_in_process, submit


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def answer(service: PostTrainingService, path: str) -> dict[str, Any]:
    found = ask(service, "GET", path)
    assert found.status_code == 200, found.text
    document: dict[str, Any] = found.json()
    return document


def printed(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=250)
    console.print(shown)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_list_has_all_jobs_and_names_unreadable_parts(service: PostTrainingService) -> None:
    sound, paused, damaged = (submit(service) for _ in range(3))
    spoil(service.store, paused, state="paused")
    spoil(service.store, damaged, artifacts="{", scheduled_at="yesterday")
    document = answer(service, "/jobs")
    listed = {each["job_uuid"]: each for each in document["data"]}
    assert {name: each["status"] for name, each in listed.items()} == {
        sound: "scheduled", paused: "unreadable", damaged: "scheduled",
    }  # fmt: skip
    assert listed[sound]["unreadable"] is None
    assert "'paused' is not known to this version" in listed[paused]["unreadable"]
    assert "scheduled_at: the time can't be read; artifacts: JSONDecodeError" in listed[damaged]["unreadable"]
    told = printed(show.jobs(document))
    assert f"{paused} can't be read in full: state: 'paused'" in told
    assert sound in told
    assert f"{sound} can't be read" not in told
    assert answer(service, "/health")["jobs"] == {
        "scheduled": 2, "in_progress": 0, "completed": 0, "failed": 0, "cancelled": 0, "unreadable": 1,
    }  # fmt: skip


def test_a_job_of_a_later_version_is_shown_and_followed(service: PostTrainingService) -> None:
    job_id = submit(service)
    spoil(service.store, job_id, state="paused")
    for path in ("", "/status", "/logs", "/events", "/metrics", "/artifacts", "/exports"):
        answer(service, f"/jobs/{job_id}{path}")
    detail = answer(service, f"/jobs/{job_id}")
    assert (detail["status"], detail["resources_allocated"]["stage"]) == ("unreadable", "unreadable")
    assert "'paused'" in detail["resources_allocated"]["unreadable"]
    assert "'paused' is not known to this version" in printed(show.job(detail))
    assert "'paused' is not known to this version" in printed(show.ended(detail))
    followed = ask(service, "GET", f"/jobs/{job_id}/logs?follow=true")
    assert "event: end" in followed.text
    for method, path in (("POST", "/cancel"), ("POST", "/resume"), ("DELETE", "")):
        refused = ask(service, method, f"/jobs/{job_id}{path}")
        assert refused.status_code == 409, refused.text


def test_figures_of_a_damaged_manifest_are_marked_unreadable(service: PostTrainingService) -> None:
    job_id = submit(service)
    folder_of(service, job_id).manifest.write_text("{")
    detail = answer(service, f"/jobs/{job_id}")
    assert detail["summary"] is None
    assert detail["resources_allocated"]["unreadable"].startswith("manifest.json: ")


def test_files_of_a_later_version_are_shown(service: PostTrainingService) -> None:
    job_id = submit(service)
    folder = folder_of(service, job_id)
    service.store.move(job_id, JobState.IN_PROGRESS)
    poem = artifact("poem", kind="poem", identifier=f"{job_id}/poem", path=str(folder.root))
    weather = line("weather", sky="blue", readiness=float("nan"))
    folder.events.write_bytes(line("saved", artifact=poem) + weather + b"garbage\n")
    manifest = {"job_uuid": job_id, "artifacts": [poem], "summary": {"loss": 1.0}, "more": [1]}
    folder.manifest.write_text(json.dumps(manifest))
    (shown,) = answer(service, f"/jobs/{job_id}/artifacts")["checkpoints"]
    assert (shown["kind"], shown["name"]) == ("poem", "poem")
    page = answer(service, f"/jobs/{job_id}/events")
    assert [each["type"] for each in page["events"]] == ["saved", "weather"]
    assert page["events"][1] == {
        "time": MOMENT.isoformat().replace("+00:00", "Z"), "type": "weather", "sky": "blue", "readiness": "NaN",
    }  # fmt: skip
    assert page["unreadable"] == 1
    assert answer(service, f"/jobs/{job_id}")["summary"] == {"loss": 1.0}


def test_an_export_that_cannot_be_read_leaves_its_job_and_the_others(service: PostTrainingService) -> None:
    job_id = submit(service)
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, JobState.COMPLETED)
    one, other = (submit(service) for _ in range(2))
    for export in (one, other):
        spoil(service.store, export, parent=job_id, recipe="export")
    folder_of(service, one).exports.symlink_to("/etc/hostname")
    folder_of(service, other).exports.write_text('{"steps": [{"name": "merged", "state": "resting"}]}')
    found = {each["job_uuid"]: each["steps"] for each in answer(service, f"/jobs/{job_id}/exports")["data"]}
    assert [step["state"] for step in found[one]] == ["unreadable"]
    assert "is a link" in found[one][0]["reason"]
    assert [(step["name"], step["state"]) for step in found[other]] == [("merged", "unreadable")]
    answer(service, f"/jobs/{job_id}")
