"""Tests job names as models: what they resolve to, who may use them, and the errors for names without a model."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import NewJob
from llama_stack_provider_moe.jobdir.events import Saved, now
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, RoutingAnalysisSpec, SFTSpec
from tests.control.server.test_allowed_paths import CAUSAL, model_at
from tests.support.host_support import BODY, Datasets, ask, caller, folder_of, serving_in_process, submit

PEFT = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "owner/name", "bias": "none",
    "target_modules": [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "o_proj")],
    "target_parameters": ["model.layers.1.mlp.experts.down_proj"], "use_rslora": False, "use_dora": False,
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8, "lora_attn_modules": ["q_proj", "output_proj"], "expert_modules": ["down_proj"]}
PAIRS = {"data": {"dataset_id": "pairs"}}
KINDS: dict[str, ArtifactKind] = {
    "adapter": "adapter", "model": "model", "merged": "merged", "evaluation": "evaluation", "gguf-q8_0": "gguf",
    "routing": "analysis",
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows["pairs"] = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4
    with serving_in_process(tmp_path_factory.mktemp("names"), datasets) as made:
        yield made


def adapter_at(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | changes))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def leave(service: PostTrainingService, job_id: str, name: str, root: Path | None = None) -> Artifact:
    """Put an artifact into a job's folder; `epoch-1` and `step-2` are checkpoints of an adapter."""
    folder = folder_of(service, job_id)
    kind = KINDS.get(name, "checkpoint")
    path = (root or (folder.root / ("checkpoints" if kind == "checkpoint" else "artifacts"))) / name
    if kind in ("adapter", "checkpoint"):
        adapter_at(path)
    elif kind in ("model", "merged"):
        model_at(path, CAUSAL)
    else:
        path.mkdir(parents=True)
    made = Artifact(
        identifier=f"{job_id}/{name}", kind=kind, path=str(path), epoch=1, step=2, created_at=now(), bytes=1
    )
    with folder.events.open("a") as events:
        events.write(Saved(artifact=made.model_dump(mode="json")).model_dump_json() + "\n")
    return made


def trained(service: PostTrainingService, *names: str, state: JobState = JobState.COMPLETED, **changes: Any) -> str:
    """A job that ran and left artifacts of these names."""
    job_id = submit(service, **{"adapter": LORA, **changes})
    service.store.move(job_id, JobState.IN_PROGRESS)
    made = tuple(leave(service, job_id, name) for name in names)
    if state is not JobState.IN_PROGRESS:
        service.store.move(job_id, state, artifacts=made)
    return job_id


def exported(service: PostTrainingService, of: str, *names: str, name: str | None = None) -> str:
    """A completed export of a job."""
    job_id = name or f"export-{service.store.get(of, None).id[-8:]}"
    folder = JobFolder(service.config.jobs_dir / job_id)
    folder.root.mkdir()
    service.store.add(NewJob(job_id, "anonymous", "export", "owner/name", str(folder.root), 0, of))
    service.store.move(job_id, JobState.IN_PROGRESS)
    service.store.move(job_id, JobState.COMPLETED, artifacts=tuple(leave(service, job_id, name) for name in names))
    return job_id


def spec_of(service: PostTrainingService, **changes: Any) -> tuple[Any, list[str]]:
    """A job as it would be, and the notes beside it."""
    answer = asyncio.run(service.validate(BODY | changes))
    return JOB_SPEC.validate_python(answer.spec), answer.notes


def refusal(service: PostTrainingService, status: int, **changes: Any) -> str:
    answer = ask(service, "POST", "/jobs/validate", json=BODY | changes)
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


# What a name resolves to.


def test_a_jobs_name_is_its_whole_model(service: PostTrainingService) -> None:
    for names, stands_for in (
        (("model", "epoch-1"), "model"),
        (("adapter", "merged"), "merged"),
    ):
        job = trained(service, *names)
        for name in (job, f"{job}/{stands_for}"):
            spec, notes = spec_of(service, model=name)
            path = folder_of(service, job).artifacts / stands_for
            assert (spec.model, spec.model_from) == (str(path), f"{job}/{stands_for}")
            assert notes == [f"model: {name!r} is {job}/{stands_for}, in {path}"]


def test_the_merged_model_of_an_export_belongs_to_the_job(service: PostTrainingService) -> None:
    job = trained(service, "adapter")
    export = exported(service, job, "merged")
    path = str(service.config.jobs_dir / export / "artifacts" / "merged")
    for name, stands_for in (
        (job, f"{job}/merged"),
        (export, f"{export}/merged"),
        (f"{export}/merged", f"{export}/merged"),
    ):
        spec, _ = spec_of(service, model=name, recipe="dpo", **PAIRS)
        assert (spec.model, spec.model_from) == (path, stands_for)


def test_two_exports_have_different_names(service: PostTrainingService) -> None:
    """As in the list of artifacts: the newest has the plain name."""
    job = trained(service, "adapter")
    older = exported(service, job, "merged")
    newer = exported(service, job, "merged", name=f"{older}-2")
    artifacts = ask(service, "GET", f"/jobs/{job}/artifacts").json()["checkpoints"]
    listed = {each["identifier"]: each["path"] for each in artifacts}
    assert {f"{job}/merged", f"{job}/merged@{older}"} < listed.keys()
    for name in (f"{job}/merged", f"{job}/merged@{older}"):
        spec, _ = spec_of(service, model=name)
        assert (spec.model, spec.model_from) == (listed[name], name)
    assert newer in listed[f"{job}/merged"]


def test_an_exports_list_shows_the_same_name(service: PostTrainingService) -> None:
    base = trained(service, "merged")
    job = trained(service, "adapter", model=base)
    export = ask(service, "POST", f"/jobs/{job}/exports", json={"merged": True}).json()["job_uuid"]
    listed = {each["job_uuid"]: each["model"] for each in ask(service, "GET", "/jobs").json()["data"]}
    assert listed[export] == listed[job] == f"{base}/merged"
    body = {"recipe": "export", "of": job, "export": {"merged": True}, "model_from": "x"}
    answer = ask(service, "POST", "/jobs/validate", json=body)
    assert (answer.status_code, "model_from: 'x' is not valid; expected no value" in answer.text) == (400, True)


def test_lists_show_a_shared_model_by_its_name(service: PostTrainingService) -> None:
    """Not by the server's path, which stays in the job's spec."""
    own = model_at(service.config.models_dir / "family" / "granite")
    job = ask(service, "POST", "/jobs", json=BODY | {"model": "family/granite"}).json()["job_uuid"]
    by_path = ask(service, "POST", "/jobs", json=BODY | {"model": str(own)}).json()["job_uuid"]
    found = ask(service, "GET", "/jobs", params={"model": "family/granite"}).json()["data"]
    assert {each["job_uuid"] for each in found} == {job, by_path}
    detail = ask(service, "GET", f"/jobs/{job}").json()
    assert detail["model"] == "family/granite"
    assert detail["spec"]["model"] == str(own)
    again = ask(service, "POST", "/jobs", json=BODY | {"model": detail["model"]})
    assert again.status_code == 200, "the name can be used again"


@pytest.mark.parametrize("start", ["", "/"])
def test_a_name_that_no_file_can_have_is_refused_without_the_servers_path(
    service: PostTrainingService, start: str
) -> None:
    told = refusal(service, 400, model=start + "m" * 500)
    assert "/models" not in told.replace("state_dir/models", "")
    assert str(service.config.state_dir) not in told
    assert "Errno" not in told


def test_lists_and_specs_keep_the_name(service: PostTrainingService) -> None:
    job = trained(service, "merged")
    answer = ask(service, "POST", "/jobs", json=BODY | {"model": job}).json()
    assert answer["notes"][0].startswith(f"model: {job!r} is {job}/merged, in /")
    listed = {each["job_uuid"]: each["model"] for each in ask(service, "GET", "/jobs").json()["data"]}
    assert listed[answer["job_uuid"]] == f"{job}/merged"
    spec = folder_of(service, answer["job_uuid"]).read_spec()
    again, _ = spec_of(service, **spec.model_dump(mode="json", exclude={"job_uuid"}))
    assert (again.model, again.model_from) == (spec.model, f"{job}/merged"), "a job's own spec can be submitted again"
    assert "no value: the server derives it from `model`" in refusal(service, 400, model_from=f"{job}/merged")
    assert "no value: the server derives it from `model`" in refusal(service, 400, model=job, model_from="gpt-5")


def test_the_apis_own_fields_accept_a_jobs_name(service: PostTrainingService) -> None:
    job = trained(service, "merged")
    training = {"n_epochs": 1, "data_config": {"dataset_id": "good", "batch_size": 1, "shuffle": True,
                                               "data_format": "instruct"}}  # fmt: skip
    rest = {"training_config": training, "hyperparam_search_config": {}, "logger_config": {}}
    sft = {"job_uuid": f"{job}-next", "model": job, **rest}
    answer = ask(service, "POST", "/supervised-fine-tune", json=sft)
    assert answer.status_code == 200, answer.text
    assert folder_of(service, f"{job}-next").read_spec().model_dump()["model_from"] == f"{job}/merged"
    service.store.request_cancel(f"{job}-next", None)
    ended = {"job_uuid": "p", "finetuned_model": f"{job}-next", "algorithm_config": {"beta": 0.1}, **rest}
    answer = ask(service, "POST", "/preference-optimize", json=ended)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        409, f"finetuned_model: job '{job}-next' is cancelled and has no finished model; resume it first",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["", "/adapter", "/epoch-1"])
def test_an_adapter_is_loaded_on_its_base(service: PostTrainingService, name: str) -> None:
    """SFT continues the adapter, an analysis loads it on the model, and recipes that compare with `model` refuse it."""
    job = trained(service, "adapter", "epoch-1")
    stands_for = f"{job}{name or '/adapter'}"
    folder = folder_of(service, job).root / ("checkpoints/epoch-1" if name == "/epoch-1" else "artifacts/adapter")
    spec, notes = spec_of(service, model=job + name, adapter={})
    assert isinstance(spec, SFTSpec)
    assert spec.adapter is not None
    assert (spec.model, spec.model_from, spec.adapter.init_from) == ("owner/name", stands_for, str(folder))
    assert spec.adapter.rank == 4
    assert notes == [
        f"model: {job + name!r} is the adapter {stands_for} on its base owner/name: the job's adapter starts from it"
    ]
    again, _ = spec_of(service, **spec.model_dump(mode="json", exclude={"job_uuid"}))
    assert again.model_from == stands_for
    sets = {"data": {"sets": {"a": "good", "b": "good"}}}
    analysis, _ = spec_of(service, recipe="routing_analysis", model=job + name, **sets)
    assert isinstance(analysis, RoutingAnalysisSpec)
    assert (analysis.model, analysis.adapter_folder) == ("owner/name", str(folder))
    analysis, notes = spec_of(service, recipe="routing_analysis", adapter_folder=job + name, **sets)
    assert (analysis.adapter_folder, notes) == (
        str(folder), [f"adapter_folder: {job + name!r} is {stands_for}, in {folder}"],
    )  # fmt: skip
    told = refusal(service, 400, recipe="dpo", model=job + name, adapter={})
    assert f'"model": "owner/name", "adapter": {{"init_from": "{stands_for}"}}' in told
    assert f"run `moe-train export {job} --merged`, and write '{job}/merged'" in told
    assert "all weights train" in refusal(service, 400, model=job + name, adapter=None)
    judge = {"refuse_dataset_id": "good", "judge": {"kind": "model", "model": job + name}}
    assert refusal(service, 400, eval=judge).startswith(
        f"eval.judge.model: {job + name!r} is not valid; expected a whole"
    )


def test_a_job_that_was_exported_keeps_its_adapters_name(service: PostTrainingService) -> None:
    """Where a field expects an adapter, a job's name means its adapter, even if it also has whole models."""
    sets = {"data": {"sets": {"a": "good", "b": "good"}}}
    at_once = trained(service, "adapter", "merged")
    later = trained(service, "adapter")
    exported(service, later, "merged")
    for job in (at_once, later):
        folder = str(folder_of(service, job).adapter)
        spec, _ = spec_of(service, adapter={"init_from": job})
        assert spec.adapter.init_from == folder
        analysis, _ = spec_of(service, recipe="routing_analysis", adapter_folder=job, **sets)
        assert analysis.adapter_folder == folder
        assert spec_of(service, model=job)[0].model_from == f"{job}/merged", "other fields get its whole model"
    whole = trained(service, "model")
    for changes in ({"adapter": {"init_from": whole}}, {"recipe": "routing_analysis", "adapter_folder": whole, **sets}):
        told = refusal(service, 400, **changes)
        assert "expected a job with an adapter; the artifacts of this one, of recipe 'sft': model" in told


def test_a_judge_can_be_a_jobs_model(service: PostTrainingService) -> None:
    job = trained(service, "merged")
    judge = {"refuse_dataset_id": "good", "judge": {"kind": "model", "model": job}}
    spec, notes = spec_of(service, eval=judge)
    assert spec.eval.judge.model == str(folder_of(service, job).merged)
    assert notes == [f"eval.judge.model: {job!r} is {job}/merged, in {folder_of(service, job).merged}"]


# Names without a model.


def test_a_job_that_ended_without_completing_has_no_model(service: PostTrainingService) -> None:
    broken = trained(service, "epoch-1", state=JobState.CANCELLED)
    assert refusal(service, 409, model=broken) == (
        f"model: job {broken!r} is cancelled and has no finished model; name one of its artifacts "
        f"({broken}/epoch-1), or resume it"
    )
    assert spec_of(service, model=f"{broken}/epoch-1", adapter={})[0].model_from == f"{broken}/epoch-1"
    assert "resume it first" in refusal(service, 409, model=trained(service, state=JobState.FAILED))


def test_a_missing_artifact_is_refused_with_a_list_of_the_existing_ones(service: PostTrainingService) -> None:
    job = trained(service, "adapter", "gguf-q8_0")
    told = refusal(service, 404, model=f"{job}/merged")
    makes = f"(`moe-train export {job} --merged` makes it)"
    assert told == f"model: job {job!r} has no artifact 'merged' {makes}; its artifacts: adapter, gguf-q8_0"
    assert "has no artifact 'epoch-7'; its artifacts:" in refusal(service, 404, model=f"{job}/epoch-7")
    assert "a model or an adapter; 'gguf-q8_0' of job" in refusal(service, 400, model=f"{job}/gguf-q8_0")
    other = trained(service, "routing", "evaluation")
    assert "of recipe 'sft': routing, evaluation" in refusal(service, 400, model=other)
    whole = trained(service, "model")
    assert "an adapter; " in refusal(service, 400, adapter={"init_from": whole})


def test_a_job_of_somebody_else_is_not_found(service: PostTrainingService) -> None:
    with caller("alice"):
        job = trained(service, "merged", "adapter", job_uuid="secret-job")
        assert spec_of(service, model=job)[0].model_from == f"{job}/merged"
        with caller("bob"):
            hers = [refusal(service, 400, model=name) for name in (job, f"{job}/merged", f"{job}/adapter")]
            none = [refusal(service, 400, model=f"no-such{rest}") for rest in ("", "/merged", "/adapter")]
            assert [each.replace(job, "no-such") for each in hers] == none, "the answer must not reveal that it exists"
            assert "secret" not in refusal(service, 404, adapter={"init_from": job}).replace("'secret-job'", "")


def test_a_hub_model_and_a_folder_keep_their_names(service: PostTrainingService) -> None:
    """A job `owner` does not hide owner/name, and a shared model takes precedence over a job of the same name."""
    job = trained(service, "merged", job_uuid="owner")
    assert spec_of(service, model="owner/name")[0].model == "owner/name"
    own = model_at(service.config.models_dir / "shared-name")
    trained(service, "merged", job_uuid="shared-name")
    assert spec_of(service, model="shared-name")[0].model == str(own)
    assert spec_of(service, model="shared-name/merged")[0].model_from == "shared-name/merged"
    assert spec_of(service, model=job)[0].model_from == "owner/merged"


def test_checkpoints_elsewhere_can_be_named(service: PostTrainingService) -> None:
    job = submit(service, adapter=LORA, checkpoint_dir="elsewhere")
    service.store.move(job, JobState.IN_PROGRESS)
    made = leave(service, job, "epoch-1", folder_of(service, job).checkpoints(folder_of(service, job).read_spec()))
    service.store.move(job, JobState.COMPLETED, artifacts=(made,))
    spec, _ = spec_of(service, adapter={"init_from": f"{job}/epoch-1"})
    assert spec.adapter.init_from == made.path
