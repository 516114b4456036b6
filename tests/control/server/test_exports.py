"""Tests the export routes: what can be exported and by whom, and that a job shows the artifacts of its exports."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from llama_stack_provider_moe.control.server import exports
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, sha256_of, write_checksums
from llama_stack_provider_moe.jobdir.export_steps import ExportStep, ExportSteps, StepState
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, write_atomic
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import ExportSpec, JobDefaults, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ExportsConfig
from tests.support.host_support import ask, caller, folder_of, serving_in_process, submit

MERGED = {"merged": True}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    defaults, allowed = JobDefaults(export={"shard_size": "2GB"}), ExportsConfig(hub_repositories=["team/*"])
    with serving_in_process(tmp_path_factory.mktemp("exports"), defaults=defaults, exports=allowed) as made:
        yield made


def left(service: PostTrainingService, job_id: str, name: str, kind: ArtifactKind, content: str) -> Artifact:
    """An artifact in the folder of a job, as a training process writes it."""
    folder = folder_of(service, job_id).artifacts / name
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    write_checksums(folder, 3)
    return Artifact(
        identifier=f"{job_id}/{name}", kind=kind, path=str(folder), epoch=1, step=3, created_at=datetime.now(UTC),
        bytes=len(content), sha256=sha256_of(folder / CHECKSUMS), verification={"max_difference": 1e-6},
    )  # fmt: skip


def trained(service: PostTrainingService, **changes: Any) -> str:
    """A completed job, with an adapter unless `changes` say otherwise."""
    job_id = submit(service, **{"adapter": {"rank": 2}} | changes)
    kind: ArtifactKind = "adapter" if changes.get("adapter", True) is not None else "model"
    ended(service, job_id, JobState.COMPLETED, left(service, job_id, kind, kind, "of the job"))
    return job_id


def ended(service: PostTrainingService, job_id: str, state: JobState, *artifacts: Artifact) -> None:
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, state, None if state is JobState.COMPLETED else "step x", artifacts=artifacts)


def exported(service: PostTrainingService, of: str, content: str) -> str:
    """A completed export with a merged folder."""
    export_id: str = ask(service, "POST", f"/jobs/{of}/exports", json=MERGED).json()["job_uuid"]
    steps = [ExportStep(name="merged", state=StepState.COMPLETED, artifact=f"{export_id}/merged")]
    write_atomic(folder_of(service, export_id).exports, ExportSteps(steps=steps))
    ended(service, export_id, JobState.COMPLETED, left(service, export_id, "merged", "merged", content))
    return export_id


def message(service: PostTrainingService, method: str, path: str, **request: Any) -> tuple[int, str]:
    answer = ask(service, method, path, **request)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def test_an_export_is_a_complete_job(service: PostTrainingService) -> None:
    of = trained(service)
    export_id = ask(service, "POST", f"/jobs/{of}/exports", json={"merged": True, "dtype": "bf16"}).json()["job_uuid"]
    job = service.store.get(export_id, None)
    assert (job.recipe, job.parent, job.model, job.state) == ("export", of, "owner/name", JobState.SCHEDULED)
    spec = folder_of(service, export_id).read_spec()
    assert isinstance(spec, ExportSpec)
    # The server's defaults fill in the block.
    assert (spec.of, spec.model, spec.export.dtype, spec.export.shard_size) == (of, "owner/name", "bf16", "2GB")
    shown = ask(service, "GET", f"/jobs/{export_id}").json()
    assert (shown["parent"], shown["recipe"], shown["spec"]["of"]) == (of, "export", of)
    assert [each["parent"] for each in ask(service, "GET", "/jobs?limit=2").json()["data"]] == [of, None]
    # The same request as a complete job, which may have a name; and only validated.
    whole = {"recipe": "export", "of": of, "export": MERGED, "job_uuid": "named"}
    assert ask(service, "POST", "/jobs/validate", json=whole).json()["spec"]["model"] == "owner/name"
    assert ask(service, "POST", "/jobs", json=whole).json() == {"job_uuid": "named"}
    listed = ask(service, "GET", f"/jobs/{of}/exports").json()["data"]
    assert [(each["job_uuid"], each["status"]) for each in listed] == [
        ("named", "scheduled"), (export_id, "scheduled"),
    ]  # fmt: skip


def test_defaults_alone_export_nothing(service: PostTrainingService) -> None:
    silent = submit(service, job_uuid="silent")
    asking = submit(service, job_uuid="asking", adapter={"rank": 2}, export=MERGED)
    never = submit(service, job_uuid="never", export=None)
    found = [folder_of(service, job_id).read_spec() for job_id in (silent, asking, never)]
    assert all(isinstance(spec, TrainingSpec) for spec in found)
    blocks = [spec.export for spec in found if not isinstance(spec, ExportSpec) and hasattr(spec, "export")]
    assert (blocks[0], blocks[2]) == (None, None)
    assert blocks[1] is not None
    assert blocks[1].shard_size == "2GB"
    with pytest.raises(ValueError, match="dtype"):
        JobDefaults(export={"dtype": "q8"})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "asks for no export; expected merged: true, serve: true, types in gguf, or push"),
        ({"merged": False}, "asks for no export"),
        ({"merged": True, "dtype": "q4"}, "dtype: 'q4' is not valid; expected 'fp32', 'bf16' or 'fp16'"),
        ({"merged": True, "shard_size": "5 GB"}, "shard_size: '5 GB' is not valid; expected a number of bytes, or of"),
        ({"merged": True, "shard_size": "999"}, "shard_size: '999' is not valid; expected at least 1KB"),
        ({"mergd": True}, "mergd: unknown key (did you mean merged?)"),
        ([MERGED], "the body: [{'merged': True}] is not valid; expected an object"),
    ],
)
def test_errors_name_fields_as_the_caller_wrote_them(service: PostTrainingService, body: Any, told: str) -> None:
    status, text = message(service, "POST", f"/jobs/{trained(service)}/exports", json=body)
    assert (status, text[: len(told)]) == (400, told)


def test_only_completed_training_jobs_can_be_exported(service: PostTrainingService) -> None:
    waits = submit(service, job_uuid="waits")
    status, text = message(service, "POST", f"/jobs/{waits}/exports", json=MERGED)
    assert (status, text) == (
        409,
        "the job: job 'waits' is scheduled; you can export only completed jobs",
    )
    assert message(service, "POST", "/jobs/nobody/exports", json=MERGED)[0] == 404
    of = trained(service)
    export_id = exported(service, of, "x")
    status, text = message(service, "POST", f"/jobs/{export_id}/exports", json=MERGED)
    assert (status, "a job that trains or ablates; the recipe of this one is 'export'" in text) == (400, True)
    whole = {"recipe": "export", "of": of, "export": MERGED, "model": "other/model"}
    assert message(service, "POST", "/jobs", json=whole)[1].startswith("model: 'other/model' is not valid")
    empty = submit(service, job_uuid="empty")
    ended(service, empty, JobState.COMPLETED)
    assert (
        "a job whose adapter or whole model still exists"
        in message(service, "POST", "/jobs/empty/exports", json=MERGED)[1]
    )


def test_a_whole_model_accepts_no_dtype(service: PostTrainingService) -> None:
    whole = trained(service, adapter=None)
    status, text = message(service, "POST", f"/jobs/{whole}/exports", json=MERGED | {"dtype": "fp16"})
    assert (status, text.startswith("dtype: 'fp16' needs an adapter to merge")) == (409, True)
    assert ask(service, "POST", f"/jobs/{whole}/exports", json=MERGED).status_code == 200
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "good"}, "adapter": None,
            "export": MERGED | {"dtype": "fp16"}}  # fmt: skip
    assert message(service, "POST", "/jobs", json=body)[1].startswith("export.dtype: 'fp16' needs an adapter to merge")


def test_exports_belong_to_the_owner(service: PostTrainingService) -> None:
    with caller("ann"):
        of = trained(service)
        export_id = exported(service, of, "secret")
    with caller("eve"):
        for method, path in (
            ("POST", f"/jobs/{of}/exports"), ("GET", f"/jobs/{of}/exports"), ("GET", f"/jobs/{export_id}"),
            ("GET", f"/jobs/{of}/artifacts/merged/weights"), ("POST", f"/jobs/{export_id}/resume"),
        ):  # fmt: skip
            assert ask(service, method, path, **({"json": MERGED} if method == "POST" else {})).status_code == 404, path
    assert service.store.get(export_id, None).owner == service.store.get(of, None).owner


def test_a_job_shows_the_artifacts_of_its_exports(service: PostTrainingService) -> None:
    of = trained(service)
    older, newer = exported(service, of, "older"), exported(service, of, "newer")
    shown = ask(service, "GET", f"/jobs/{of}/artifacts").json()["checkpoints"]
    assert [(each["identifier"], each["name"], each["post_training_job_id"]) for each in shown] == [
        (f"{of}/adapter", "adapter", of),
        (f"{of}/merged", "merged", newer),
        (f"{of}/merged@{older}", f"merged@{older}", older),
    ]
    assert all(each["sha256"] and each["verification"] == {"max_difference": 1e-6} for each in shown)
    for name, content in (("merged", "newer"), (f"merged@{older}", "older"), ("adapter", "of the job")):
        files = ask(service, "GET", f"/jobs/{of}/artifacts/{name}").json()
        assert {file["path"] for file in files["files"]} == {"weights", CHECKSUMS}
        assert ask(service, "GET", f"/jobs/{of}/artifacts/{name}/weights").text == content
    assert ask(service, "GET", f"/jobs/{older}/artifacts/merged/weights").text == "older"
    assert ask(service, "GET", f"/jobs/{of}/artifacts/merged@nobody/weights").status_code == 404
    status = ask(service, "GET", f"/jobs/{of}/status").json()
    steps = [(each["job_uuid"], [(step["name"], step["state"]) for step in each["steps"]])
             for each in status["resources_allocated"]["exports"]]  # fmt: skip
    assert steps == [(newer, [("merged", "completed")]), (older, [("merged", "completed")])]
    assert status["status"] == "completed"


def test_an_export_resumes_without_a_checkpoint_until_it_completes(service: PostTrainingService) -> None:
    of = trained(service)
    export_id = ask(service, "POST", f"/jobs/{of}/exports", json=MERGED).json()["job_uuid"]
    ended(service, export_id, JobState.FAILED)
    resumed = ask(service, "POST", f"/jobs/{export_id}/resume").json()
    assert resumed == {"job_uuid": export_id, "resumes": "from_beginning"}
    again: Job = service.store.get(export_id, None)
    assert (again.state, again.parent) == (JobState.SCHEDULED, of)
    assert service.store.get(of, None).state is JobState.COMPLETED
    done = exported(service, of, "x")
    assert message(service, "POST", f"/jobs/{done}/resume")[0] == 409


def test_a_job_is_deleted_with_its_exports(service: PostTrainingService) -> None:
    of = trained(service)
    export_id = exported(service, of, "x")
    waits = ask(service, "POST", f"/jobs/{of}/exports", json=MERGED).json()["job_uuid"]
    status, text = message(service, "DELETE", f"/jobs/{of}")
    assert (status, f"job {waits!r} is scheduled; cancel that one" in text) == (409, True)
    assert folder_of(service, of).root.is_dir()
    asyncio.run(service.cancel(waits))
    gone = {"job_uuid": of, "kept": [], "exports": [waits, export_id], "broken": [], "withdrawn": None}
    assert ask(service, "DELETE", f"/jobs/{of}").json() == gone
    assert not {job.id for job in service.store.list(None)} & {of, waits, export_id}
    assert not any(folder_of(service, job_id).root.exists() for job_id in (of, waits, export_id))


# Exports that a server can't make are refused at submission, also in a training job's own block.


@pytest.mark.parametrize(
    ("block", "status", "told"),
    [
        ({"gguf": ["q4"]}, 400, "gguf.0: 'q4' is not valid; expected 'f32', 'f16', 'bf16', 'q8_0', 'q4_0'"),
        ({"gguf": ["f16", "f16"]}, 400, "gguf: 'f16' is named twice; expected each type once"),
        ({"gguf": []}, 400, "asks for no export; expected merged: true, serve: true, types in gguf, or push"),
        ({"gguf": ["f16"]}, 501, "run `moe-train export setup`"),
        ({"ollama": {"name": "m"}}, 400, "ollama: needs a GGUF file; name its type in gguf"),
        (
            {"gguf": ["f16"], "ollama": {"name": "m", "gguf": "q8_0"}},
            400,
            "ollama.gguf: 'q8_0' is not valid; expected one of those",
        ),
        ({"push": {"repo_id": "team/m", "what": "merged"}}, 400, "push.what: 'merged' needs merged: true"),
        ({"push": {"repo_id": "team/m", "what": "gguf"}}, 400, "push.what: 'gguf' needs types in gguf"),
        ({"push": {"repo_id": "alone"}}, 400, "push.repo_id: 'alone' is not valid; expected NAMESPACE/NAME"),
        ({"gguf": ["f16"], "ollama": {"name": "a b"}}, 400, "ollama.name: 'a b' is not valid; expected [NAMESPACE/]"),
        ({"gguf": ["f16"], "ollama": {"name": "m", "url": "file:///etc"}}, 400, "ollama.url: 'file:///etc' is not val"),
    ],
)
def test_impossible_exports_are_refused(
    service: PostTrainingService, block: dict[str, Any], status: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_TRAIN_CACHE", str(service.config.state_dir / "nothing-here"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    found, text = message(service, "POST", f"/jobs/{trained(service)}/exports", json=block)
    assert (found, told in text) == (status, True), text
    body = {"recipe": "sft", "model": "m", "data": {"dataset_id": "good"}, "adapter": {"rank": 2}, "export": block}
    found, text = message(service, "POST", "/jobs", json=body)
    assert (found, told.removeprefix("ollama.") in text) == (status, True), text


def test_a_job_pushes_only_to_allowed_servers(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "find_toolchain", lambda _: None)  # this test does not need llama.cpp
    of = trained(service)
    ollama = {"name": "m", "url": "http://127.0.0.1:22"}
    status, text = message(service, "POST", f"/jobs/{of}/exports", json={"gguf": ["f16"], "ollama": ollama})
    assert (status, text) == (
        403,
        "ollama.url: jobs of this server may not push to 'http://127.0.0.1:22'; allowed "
        "(`exports.ollama_urls`): 'http://127.0.0.1:11434'",
    )
    status, text = message(service, "POST", f"/jobs/{of}/exports", json={"push": {"repo_id": "some/body"}})
    assert (status, text) == (
        403,
        "push.repo_id: jobs of this server may not push to 'some/body'; allowed (`exports.hub_repositories`): 'team/*'",
    )
    push = {"repo_id": "team/model"}
    assert ask(service, "POST", f"/jobs/{of}/exports", json={"push": push}).status_code == 200
    allowed = {"gguf": ["q8_0", "q4_k_m"], "ollama": {"name": "m"}}
    export_id = ask(service, "POST", f"/jobs/{of}/exports", json=allowed).json()["job_uuid"]
    spec = folder_of(service, export_id).read_spec()
    assert isinstance(spec, ExportSpec)
    assert spec.export.for_ollama == "q4_k_m", "the smallest"


def test_an_export_without_a_model_waits_for_no_gpu(service: PostTrainingService) -> None:
    of = trained(service)
    found = []
    for block in (MERGED, MERGED | {"load_check": False}):
        export_id = ask(service, "POST", f"/jobs/{of}/exports", json=block).json()["job_uuid"]
        found.append(service.store.get(export_id, None).gpus)
    assert found == [None, 0]
