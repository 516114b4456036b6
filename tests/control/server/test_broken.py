"""Tests the answers when the server's disk is full, or a job's own files are damaged."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import BODY, Datasets, ask, folder_of, serving_in_process, submit
from tests.support.jobs_support import fill, small_disk


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def test_a_job_is_refused_when_the_disk_has_no_room(tmp_path: Path) -> None:
    small, datasets = tmp_path / "small", Datasets()
    small.mkdir()
    with small_disk(small), serving_in_process(small, datasets) as service:
        ballast = fill(small)
        answer = ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "mine"})
        assert answer.status_code == 507
        assert answer.json()["error"]["message"].startswith("the disk is full (")
        assert (
            answer.json()["error"]["message"].find(
                "; the job was not accepted: delete jobs that have ended (moe-train rm JOB)"
            )
            > 0
        )
        assert ask(service, "GET", "/jobs").json()["data"] == [], "the server still answers"
        ballast.unlink()
        # The disk has room at first, but not for the rows.
        datasets.rows["long"] = [{"prompt": "Q" * 1000, "completion": "A" * 1000}] * 8000
        answer = ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "mine", "data": {"dataset_id": "long"}})
        assert answer.status_code == 507
        assert list((service.config.state_dir / "staging").iterdir()) == []
        assert ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "mine"}).status_code == 200
        service.store.close()


@pytest.mark.parametrize("damage", ["{", "[]", "\x00" * 64], ids=["cut", "a list", "zeros"])
def test_a_job_with_damaged_files_can_be_shown_and_deleted(service: PostTrainingService, damage: str) -> None:
    job_id = submit(service)
    folder = folder_of(service, job_id)
    for path in (folder.spec, folder.resolved, folder.manifest, folder.events):
        path.write_text(damage)
    service.store.move(job_id, JobState.FAILED, reason="manifest.json is damaged")
    answer = ask(service, "GET", f"/jobs/{job_id}")
    assert answer.status_code == 200
    told = answer.json()
    assert told["reason"] == "manifest.json is damaged"
    assert told["spec"]["unreadable"].startswith("spec.json: ")
    assert told["resolved"]["unreadable"].startswith("resolved.json: ")
    assert told["summary"] is None
    for path in ("", "/logs", "/events", "/metrics", "/artifacts"):
        assert ask(service, "GET", f"/jobs/{job_id}{path}").status_code == 200, path
    refused = ask(service, "POST", f"/jobs/{job_id}/resume")
    assert refused.status_code == 409
    assert "its spec.json is damaged" in refused.json()["error"]["message"]
    assert ask(service, "DELETE", f"/jobs/{job_id}").status_code == 200
    assert not folder.root.exists()


def test_figures_of_a_damaged_manifest_are_not_invented(service: PostTrainingService) -> None:
    job_id = submit(service)
    folder_of(service, job_id).manifest.write_text(json.dumps({"job_uuid": job_id, "summary": {"loss": "low"}}))
    assert ask(service, "GET", f"/jobs/{job_id}").json()["summary"] is None
