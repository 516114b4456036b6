"""Jobs that name jobs which have not completed: accepted as far as can be known, checked again when they start."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.late_names import resolved
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput, MoeError, NotFound
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import AblationSpec, MixSpec, RoutingAnalysisSpec, SFTSpec
from tests.control.server.test_model_names import LORA, leave, refusal, spec_of
from tests.support.host_support import Datasets, ask, caller, folder_of, serving_in_process, submit

WHOLE = {"adapter": None}
SETS = {"data": {"sets": {"a": "good", "b": "good"}}}

ABLATE = {"ablate": [{"layer": "0", "measurement": 0}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows["pairs"] = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 4
    with serving_in_process(tmp_path_factory.mktemp("waiting"), datasets) as made:
        yield made


def complete(service: PostTrainingService, job_id: str, *names: str) -> None:
    """Let a job run and leave artifacts of these names."""
    service.store.move(job_id, JobState.IN_PROGRESS)
    made = tuple(leave(service, job_id, name) for name in names)
    service.store.move(job_id, JobState.COMPLETED, artifacts=made)


def detail(service: PostTrainingService, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(service, "GET", f"/jobs/{job_id}").json()
    return found


def start(service: PostTrainingService, job_id: str) -> Any:
    """What the supervisor does once the other jobs have completed."""
    return resolved(service.store, service.config, job_id)


def test_a_job_waits_for_the_model_that_it_names(service: PostTrainingService) -> None:
    first = submit(service, **WHOLE)
    answer = ask(service, "POST", "/jobs", json={"recipe": "dpo", "model": first, "data": {"dataset_id": "pairs"}})
    second = answer.json()["job_uuid"]
    assert answer.json()["notes"] == [f"model: {first!r} is what job {first} will leave: this job waits for it"]
    seen = detail(service, second)
    assert (seen["status"], seen["waits_for"]) == ("scheduled", [first])
    assert seen["resources_allocated"]["waits_for"] == [first]
    assert seen["spec"]["model"] == seen["spec"]["model_from"] == f"{first}/model"
    listed = {job["job_uuid"]: job["waits_for"] for job in ask(service, "GET", "/jobs").json()["data"]}
    assert (listed[second], listed[first]) == ([first], [])
    shown = {job["job_uuid"]: job for job in ask(service, "GET", "/activity").json()["waiting"]}[second]
    assert (shown["position"], shown["waits_for"]) == (0, [first])
    complete(service, first, "model")
    assert detail(service, second)["waits_for"] == []
    spec = start(service, second)
    assert (spec.model, spec.model_from) == (str(folder_of(service, first).model), f"{first}/model")
    assert folder_of(service, second).read_spec() == spec


def test_dry_runs_tell_what_would_be_waited_for(service: PostTrainingService) -> None:
    first = submit(service, **WHOLE)
    spec, notes = spec_of(service, model=f"{first}/model")
    assert (spec.model, notes) == (
        f"{first}/model", [f"model: '{first}/model' is what job {first} will leave: this job waits for it"]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["", "/adapter"])
def test_an_adapter_that_is_still_trained_is_continued(service: PostTrainingService, name: str) -> None:
    first = submit(service, adapter=LORA)
    second = submit(service, model=first + name, adapter={})
    seen = folder_of(service, second).read_spec()
    assert isinstance(seen, SFTSpec)
    assert seen.adapter is not None
    assert (seen.model, seen.adapter.init_from, seen.adapter.rank) == ("owner/name", f"{first}/adapter", 4)
    third = submit(service, model=second, adapter={})
    assert detail(service, third)["waits_for"] == [second]
    told = refusal(service, 400, model="owner/name", adapter={"init_from": first, "rank": 9})
    assert told.startswith("adapter.rank: 9 is not valid; expected 4, as in the adapter that adapter.init_from names")
    for each, before in ((second, first), (third, second)):
        complete(service, before, "adapter")
        spec = start(service, each)
        assert (spec.model, spec.adapter.init_from, spec.adapter.rank) == (
            "owner/name", str(folder_of(service, before).adapter), 4
        )  # fmt: skip


def test_every_place_that_names_a_job_may_name_one_that_runs(service: PostTrainingService) -> None:
    whole, adapter = submit(service, **WHOLE), submit(service, adapter=LORA)
    analysis = submit(service, recipe="routing_analysis", **SETS)
    measured = submit(service, recipe="ablation_measure", data={"sets": {"target": "good", "baseline": "good"}})
    judge = {"refuse_dataset_id": "good", "judge": {"kind": "model", "model": whole}}
    masked = {"refuse_dataset_id": "good", "masked_from_analysis": {"job": analysis, "set": "a", "top": 1}}
    chosen = {"job": analysis, "set": "a", "top": 1}
    branches = [{"name": "a", "model": whole}, {"name": "b", "model": whole}]
    for changes, waits in (
        ({"adapter": {"init_from": adapter}}, [adapter]),
        ({"eval": judge}, [whole]),
        ({"eval": masked}, [analysis]),
        ({"adapter": {"from_analysis": chosen, "plan": "per_expert"}}, [analysis]),
        ({"recipe": "routing_analysis", "adapter_folder": adapter, **SETS}, [adapter]),
        ({"recipe": "mix", "method": "btx", "branches": branches, "data": ...}, [whole]),
        ({"recipe": "ablation", "measurements": measured, **ABLATE, "data": ...}, [measured]),
        ({"recipe": "ablation", "model": whole, "measurements": measured, **ABLATE, "data": ...}, [whole, measured]),
    ):
        body = {name: value for name, value in ({"data": {"dataset_id": "good"}} | changes).items() if value is not ...}
        answer = ask(service, "POST", "/jobs", json={"recipe": "sft", "model": "owner/name"} | body)
        assert answer.status_code == 200, (changes, answer.text)
        assert detail(service, answer.json()["job_uuid"])["waits_for"] == waits, changes
    complete(service, adapter, "adapter")
    complete(service, whole, "model")
    specs = [start(service, job.id) for job in service.store.waits.due().ready]
    mixed = next(spec for spec in specs if isinstance(spec, MixSpec))
    assert [branch.model for branch in mixed.branches] == [str(folder_of(service, whole).model)] * 2
    loaded = next(spec for spec in specs if isinstance(spec, RoutingAnalysisSpec))
    assert loaded.adapter_folder == str(folder_of(service, adapter).adapter)
    assert not any(isinstance(spec, AblationSpec) for spec in specs), "their measurements have not completed"


def test_what_a_job_will_not_leave_is_refused_at_once(service: PostTrainingService) -> None:
    adapter, whole = submit(service, adapter=LORA), submit(service, **WHOLE)
    analysis = submit(service, recipe="routing_analysis", **SETS)
    assert refusal(service, 404, model=f"{adapter}/merged") == (
        f"model: job {adapter!r} will leave no 'merged'; for that, set options.save_merged "
        "in it; it will leave: adapter"
    )
    assert "will leave no 'adapter'; it will leave: model" in refusal(service, 404, model=f"{whole}/adapter")
    assert "will leave no adapter, with its recipe 'sft'; it will leave: model" in refusal(
        service, 404, adapter={"init_from": whole}
    )
    assert "will leave no model or adapter, with its recipe 'routing_analysis'; it will leave: nothing" in refusal(
        service, 404, model=analysis
    )
    unknown = refusal(service, 400, model=f"{whole}/nope")  # may be a hub id, so the hub is asked
    assert unknown.endswith(f"; job {whole!r} will leave no 'nope'; it will leave: model"), unknown
    told = refusal(service, 400, recipe="dpo", model=adapter, data={"dataset_id": "pairs"}, adapter={})
    assert f"set options.save_merged in that job, and write '{adapter}/merged'" in told
    assert "this one has recipe 'sft'" in refusal(
        service, 400, adapter={"plan": "per_expert", "from_analysis": {"job": whole, "set": "a", "top": 1}}
    )
    for changes in ({"export": {"merged": True}}, {"options": {"save_merged": True}}):
        merged = submit(service, adapter=LORA, **changes)
        waiting = submit(service, recipe="dpo", model=merged, data={"dataset_id": "pairs"})
        assert folder_of(service, waiting).read_spec().model == f"{merged}/merged"
    complete(service, merged, "adapter", "merged")
    assert start(service, waiting).model == str(folder_of(service, merged).merged)


def test_a_playground_does_not_wait(service: PostTrainingService) -> None:
    job = submit(service, **WHOLE)
    answer = ask(service, "POST", "/jobs", json={"recipe": "playground", "model": job})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        409, f"model: job {job!r} is scheduled; you can use its artifacts once it has completed"
    )  # fmt: skip


def test_what_can_be_known_only_later_is_refused_with_the_same_words(service: PostTrainingService) -> None:
    first = submit(service, **WHOLE)
    second = submit(service, model=first)
    complete(service, first, "model")
    model = folder_of(service, first).model
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    now = refusal(service, 400, model=first)
    assert "a folder with weights in *.safetensors files" in now
    with pytest.raises(InvalidInput) as later:
        start(service, second)
    assert str(later.value) == now
    third = submit(service, adapter=LORA)
    fourth = submit(service, model=f"{third}/epoch-3", adapter={})
    complete(service, third, "adapter", "epoch-1")
    with pytest.raises(NotFound, match=f"job {third!r} has no artifact 'epoch-3'; its artifacts: adapter, epoch-1"):
        start(service, fourth)


def test_the_job_that_was_accepted_runs_whatever_the_server_s_defaults_are_then(service: PostTrainingService) -> None:
    first = submit(service, **WHOLE)
    second = submit(service, model=first, optimizer={"lr": 3e-5})
    complete(service, first, "model")
    accepted = json.loads(folder_of(service, second).spec.read_text())
    changed = service.config.model_copy(
        update={
            "defaults": type(service.config.defaults).model_validate(
                {"optimizer": {"lr": 1e-3}, "training": {"n_epochs": 7}}
            )
        }
    )
    spec = resolved(service.store, changed, second).model_dump(mode="json")
    assert {name for name in spec if spec[name] != accepted[name]} == {"model"}


def test_a_stranger_s_job_is_not_waited_for(service: PostTrainingService) -> None:
    with caller("ann"):
        job = submit(service, **WHOLE)
    with caller("bob"):
        answer = ask(
            service, "POST", "/jobs/validate", json={"recipe": "sft", "model": job, "data": {"dataset_id": "good"}}
        )
    assert answer.status_code == 400
    assert "waits" not in answer.text
    assert "a job's name, a folder, or a model of the hub" in answer.text


def test_a_damaged_record_fails_the_job_alone(service: PostTrainingService, tmp_path: Path) -> None:
    first = submit(service, **WHOLE)
    second = submit(service, model=first)
    complete(service, first, "model")
    folder = folder_of(service, second)
    content = folder.later.read_text()
    folder.later.unlink()
    (tmp_path / "later.json").write_text(content)
    folder.later.symlink_to(tmp_path / "later.json")
    with pytest.raises(MoeError, match=r"later\.json of job"):
        start(service, second)


def test_every_job_of_a_sweep_waits(service: PostTrainingService) -> None:
    first = submit(service, **WHOLE)
    job = {"recipe": "sft", "model": first, "data": {"dataset_id": "good"}, "options": {"validation_split": 0.25}}
    body = {"job": job, "parameters": {"optimizer.lr": [1e-4, 2e-4]}}
    jobs = ask(service, "POST", "/sweeps", json=body).json()["jobs"]
    assert service.store.waits.of_jobs(jobs) == {name: [first] for name in jobs}
    complete(service, first, "model")
    for name in jobs:
        assert start(service, name).model == str(folder_of(service, first).model)


def test_a_completed_job_that_is_being_exported_is_waited_for(service: PostTrainingService) -> None:
    first = submit(service, adapter=LORA)
    complete(service, first, "adapter")
    assert "has no artifact 'merged'" in refusal(service, 404, model=f"{first}/merged")
    export = ask(service, "POST", f"/jobs/{first}/exports", json={"merged": True}).json()["job_uuid"]
    second = submit(service, model=f"{first}/merged")
    assert detail(service, second)["waits_for"] == [export]
    complete(service, export, "merged")
    assert start(service, second).model == str(folder_of(service, export).merged)
