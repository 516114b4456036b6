"""Tests actions on a job that has stopped, and who may take them: resume, delete, and the host's access policy."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_stack.core.access_control.datatypes import AccessRule

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.checkpoint_index import STATE, write_checksums
from llama_stack_provider_moe.jobdir.experts_backend import read_override
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.host_support import ask, caller, folder_of, serving_in_process, submit


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("life")) as made:
        yield made


def ended(service: PostTrainingService, state: JobState, **changes: Any) -> str:
    """A job that ran and ended in this state."""
    job_id = submit(service, **changes)
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, state, reason=f"it was {state}")
    return job_id


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / STATE).write_text(json.dumps({"global_step": step}))
    (path / "weights").write_text("weights")
    write_checksums(path, step)
    return path


def message(service: PostTrainingService, method: str, path: str, status: int) -> str:
    answer = ask(service, method, path)
    assert answer.status_code == status, answer.text
    text: str = answer.json()["error"]["message"]
    return text


def test_a_job_resumes_with_another_experts_backend(service: PostTrainingService) -> None:
    """It applies to this start and later ones; a resumption that says nothing leaves it; spec.json stays as it was."""
    job_id = ended(service, JobState.FAILED)
    folder = folder_of(service, job_id)
    before = folder.spec.read_bytes()
    answer = ask(service, "POST", f"/jobs/{job_id}/resume", json={"moe": {"experts_backend": "torch"}})
    assert (answer.status_code, answer.json()["resumes"]) == (200, "from_beginning")
    override = read_override(folder)
    assert override is not None
    assert override.experts_backend == "torch"
    assert override.reason.startswith("asked for when the job was resumed at 20")
    for state in (JobState.IN_PROGRESS, JobState.CANCELLED):
        service.store.move(job_id, state)
    assert ask(service, "POST", f"/jobs/{job_id}/resume").status_code == 200
    assert read_override(folder) == override
    refused = ask(service, "POST", f"/jobs/{job_id}/resume", json={"moe": {"experts_backend": "auto"}})
    assert refused.status_code == 409
    assert read_override(folder) == override, "a job that waits was not changed"
    assert folder.spec.read_bytes() == before


@pytest.mark.parametrize(("changes", "body", "told"), [
    ({}, {"moe": {"experts_backend": "cuda"}}, "moe.experts_backend: 'cuda' is not valid; expected 'auto', 'torch'"),
    ({}, {"moe": {"router_jitter": 0.1}}, "moe.router_jitter: unknown"),
    ({}, {"optimizer": {"lr": 1}}, "optimizer: unknown"), ({}, [], "the body:"),
    ({"moe": {"moe_load_balancing": "expert_choice"}}, {"moe": {"experts_backend": "peft"}},
     "moe_load_balancing: 'expert_choice' needs our code for experts"),
    ({"moe": {"enable_moe_optimizations": False}}, {"moe": {"experts_backend": "triton"}},
     "'triton' is not valid with enable_moe_optimizations false"),
])  # fmt: skip
def test_a_resumption_that_the_job_does_not_allow_is_refused(
    service: PostTrainingService, changes: dict[str, Any], body: Any, told: str
) -> None:
    job_id = ended(service, JobState.FAILED, **changes)
    answer = ask(service, "POST", f"/jobs/{job_id}/resume", json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert service.store.get(job_id, None).state is JobState.FAILED
    assert read_override(folder_of(service, job_id)) is None


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_a_job_resumes_from_its_checkpoint(service: PostTrainingService, state: JobState) -> None:
    job_id = ended(service, state)
    checkpoint(folder_of(service, job_id).root / "checkpoints", 4)
    answer = ask(service, "POST", f"/jobs/{job_id}/resume")
    assert (answer.status_code, answer.json()) == (200, {"job_uuid": job_id, "resumes": "from_checkpoint"})
    status = ask(service, "GET", f"/jobs/{job_id}/status").json()
    assert (status["status"], status["completed_at"]) == ("scheduled", None)
    assert status["resources_allocated"]["queue_position"] >= 1
    assert "reason" not in status["resources_allocated"]
    assert "is scheduled" in message(service, "POST", f"/jobs/{job_id}/resume", 409)
    service.store.move(job_id, JobState.IN_PROGRESS)
    assert "is in_progress" in message(service, "POST", f"/jobs/{job_id}/resume", 409)
    service.store.move(job_id, JobState.COMPLETED)
    assert "has completed" in message(service, "POST", f"/jobs/{job_id}/resume", 409)


def test_a_checkpoint_elsewhere_counts(service: PostTrainingService) -> None:
    job_id = ended(service, JobState.FAILED, checkpoint_dir="mine")
    spec = folder_of(service, job_id).read_spec()
    checkpoint(folder_of(service, job_id).checkpoints(spec), 4)
    assert ask(service, "POST", f"/jobs/{job_id}/resume").status_code == 200


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_without_a_checkpoint_a_job_starts_from_the_beginning(service: PostTrainingService, state: JobState) -> None:
    job_id = ended(service, state)
    assert ask(service, "POST", f"/jobs/{job_id}/resume").json() == {
        "job_uuid": job_id, "resumes": "from_beginning"
    }  # fmt: skip
    assert service.store.get(job_id, None).state is JobState.SCHEDULED
    waiting = submit(service)
    service.store.request_cancel(waiting, None)
    assert ask(service, "POST", f"/jobs/{waiting}/resume").status_code == 200


def test_damaged_checkpoints_are_not_replaced_by_a_new_start(service: PostTrainingService) -> None:
    job_id = ended(service, JobState.FAILED)
    for step in (4, 8):
        path = checkpoint(folder_of(service, job_id).root / "checkpoints", step)
        (path / "weights").write_text("w3ights")
    told = message(service, "POST", f"/jobs/{job_id}/resume", 409)
    assert "none of its checkpoints is complete (step-8: weights was changed after it was written" in told
    assert "step-4: " in told
    assert service.store.get(job_id, None).state is JobState.FAILED
    checkpoint(folder_of(service, job_id).root / "checkpoints", 2)
    assert ask(service, "POST", f"/jobs/{job_id}/resume").status_code == 200, "an older complete checkpoint is enough"


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.COMPLETED])
def test_a_deleted_job_is_gone(service: PostTrainingService, state: JobState) -> None:
    job_id = ended(service, state)
    folder = folder_of(service, job_id).root
    (folder / "big").write_bytes(b"x" * 10_000)
    answer = ask(service, "DELETE", f"/jobs/{job_id}")
    gone = {"job_uuid": job_id, "kept": [], "exports": [], "broken": [], "withdrawn": None}
    assert (answer.status_code, answer.json()) == (200, gone)
    assert not folder.exists()
    assert not any("big" in path.name for path in service.config.state_dir.rglob("*")), "the files are gone everywhere"
    for method, path in (("GET", ""), ("GET", "/logs"), ("DELETE", ""), ("POST", "/resume")):
        assert message(service, method, f"/jobs/{job_id}{path}", 404) == f"job {job_id!r} does not exist"
    assert submit(service, job_uuid=job_id) == job_id, "its name is free again"


def test_a_live_job_is_not_deleted(service: PostTrainingService) -> None:
    job_id = submit(service)
    assert "is scheduled; cancel it before" in message(service, "DELETE", f"/jobs/{job_id}", 409)
    service.store.move(job_id, JobState.IN_PROGRESS)
    assert "is in_progress; cancel it before" in message(service, "DELETE", f"/jobs/{job_id}", 409)
    assert folder_of(service, job_id).spec.exists()


def test_an_interrupted_deletion_can_be_repeated(service: PostTrainingService) -> None:
    job_id = ended(service, JobState.FAILED)
    shutil.rmtree(folder_of(service, job_id).root)
    assert ask(service, "GET", f"/jobs/{job_id}").json()["resources_allocated"]["disk_bytes"] == 0
    assert "can't be resumed" in message(service, "POST", f"/jobs/{job_id}/resume", 409)
    assert ask(service, "DELETE", f"/jobs/{job_id}").status_code == 200


def test_checkpoints_elsewhere_stay_and_are_named(service: PostTrainingService) -> None:
    job_id = ended(service, JobState.CANCELLED, checkpoint_dir="kept")
    folder = folder_of(service, job_id)
    elsewhere = folder.checkpoints(folder.read_spec())
    path = checkpoint(elsewhere, 1) / "weights"
    used = ask(service, "GET", f"/jobs/{job_id}").json()["resources_allocated"]["disk_bytes"]
    everything = [*folder.root.rglob("*"), *elsewhere.rglob("*")]
    assert used == sum(each.stat().st_size for each in everything if each.is_file())
    assert ask(service, "DELETE", f"/jobs/{job_id}").json()["kept"] == [str(elsewhere)]
    assert path.exists()


def test_the_status_shows_how_a_job_was_run(service: PostTrainingService) -> None:
    job_id = submit(service, resources={"gpus": 0})
    assert service.store.get(job_id, None).gpus == 0
    told = ask(service, "GET", f"/jobs/{job_id}/status").json()["resources_allocated"]
    assert {name: told[name] for name in ("lost", "devices", "stopped_by")} == {
        "lost": 0, "devices": None, "stopped_by": None,
    }  # fmt: skip
    assert "disk_bytes" not in told, "computing it reads every file"


ADMIN = "user with admin in roles"
# policy, actions of the admin (role admin) on another user's job, actions of everyone else
POLICIES: dict[str, tuple[list[dict[str, Any]], set[str], set[str]]] = {
    "none": ([], set(), set()),
    "admin of everything": (
        [{"permit": {"actions": ["create", "read", "update", "delete"]}, "when": ADMIN}],
        {"read", "update", "delete"},
        set(),
    ),
    "admin of jobs may look": (
        [{"permit": {"actions": ["read"], "resource": "post_training_job::*"}, "when": ADMIN}],
        {"read"},
        set(),
    ),
    "admin of models": ([{"permit": {"actions": ["read"], "resource": "model::*"}, "when": ADMIN}], set(), set()),
    "but not of jobs": (
        [
            {"forbid": {"actions": ["read", "delete"], "resource": "post_training_job::*"}},
            {"permit": {"actions": ["read", "update", "delete"]}, "when": ADMIN},
        ],
        {"update"},
        set(),
    ),
    "the host's own default, written out": (
        [
            {"permit": {"actions": ["read", "update", "delete"]}, "when": ["user in owners teams"]},
            {"permit": {"actions": ["read", "update", "delete"]}, "when": ["user is owner"]},
            {"permit": {"actions": ["read", "update", "delete"]}, "when": ["resource is unowned"]},
        ],
        set(),
        set(),
    ),
    "one by name": ([{"permit": {"actions": ["read"], "principal": "bob"}}], set(), {"read"}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_hosts_policy_decides_who_is_an_admin(
    service: PostTrainingService, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, admins, others = POLICIES[name]
    monkeypatch.setattr(service, "_policy", [AccessRule.model_validate(rule) for rule in rules])
    with caller("alice", teams=["a"]):
        job_id = ended(service, JobState.FAILED)
    (checkpoint(folder_of(service, job_id).root / "checkpoints", 1) / "weights").unlink()  # so that it can't be resumed
    for principal, attributes, allowed in (
        ("root", {"roles": ["admin"], "teams": ["a"]}, admins),
        ("bob", {"teams": ["a"]}, others),
    ):
        with caller(principal, **attributes):
            read = ask(service, "GET", f"/jobs/{job_id}/status").status_code
            listed = job_id in [job["job_uuid"] for job in ask(service, "GET", "/jobs").json()["data"]]
            update = ask(service, "POST", f"/jobs/{job_id}/resume").status_code
            # The answer is 404, as for a missing job, or the action has happened.
            assert (read, listed, update) == (
                200 if "read" in allowed else 404, "read" in allowed, 409 if "update" in allowed else 404,
            ), principal  # fmt: skip
            if "delete" not in allowed:
                assert ask(service, "DELETE", f"/jobs/{job_id}").status_code == 404
    with caller("alice"):
        assert ask(service, "GET", f"/jobs/{job_id}/status").status_code == 200, "owners keep access to their own jobs"
    if "delete" in admins:
        with caller("root", roles=["admin"]):
            assert ask(service, "DELETE", f"/jobs/{job_id}").status_code == 200


def test_without_authentication_nobody_is_an_admin() -> None:
    rule = AccessRule.model_validate({"permit": {"actions": ["read", "update", "delete"]}})
    for action in ("read", "update", "delete"):
        assert not compat.may_reach_every_job([rule], action)
