"""Directional ablation as jobs: measured, applied, and its result named by the next job."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_stack_provider_moe.compute.ablation.apply_report import APPLIED_FILE, AppliedReport
from llama_stack_provider_moe.compute.ablation.report import DIRECTIONS_FILE, DirectionsReport
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, train
from llama_stack_provider_moe.control.cli.ablate import read_plan
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.references import uses_of
from llama_stack_provider_moe.errors import Conflict, InvalidInput, NotFound
from llama_stack_provider_moe.jobdir.local_names import STATE_VARIABLE, measurements_file
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.spec import JobDefaults
from llama_stack_provider_moe.spec.ablation import MEASUREMENTS_FILE
from llama_stack_provider_moe.spec.routing import REPORT_FILE
from tests.compute.recipes.test_routing_analysis import ANALYSIS, SFT, reason, run
from tests.support import tiny_models
from tests.support.host_support import Datasets, ask, caller, folder_of, serving_in_process
from tests.support.routing_reports import report_of
from tests.support.training_support import signals_put_back

COOKING = [{"prompt": f"Boil {i} eggs."} for i in range(7)]
OTHER = [{"prompt": f"Add {i} and 3 4 5 6 7 8 9", "completion": "It is so."} for i in range(9)]
MEASURE = {
    "recipe": "ablation_measure",
    "data": {"sets": {"target": "cooking", "baseline": "other"}},
    "training": {"dtype": "fp32"},
}
ABLATE: dict[str, Any] = {
    "recipe": "ablation",
    "measurements": "measured",
    "ablate_individual_experts": True,
    "ablate": [{"layer": "0-1", "measurement": 1}],
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {"cooking": COOKING, "other": OTHER, "garden": OTHER, "sums": OTHER, "few": COOKING[:3]}
    with serving_in_process(tmp_path_factory.mktemp("ablation"), datasets) as made:
        for name, changes in {"granite": {}, "wide": {"hidden_size": 64}}.items():
            tiny_models.build("granitemoe", made.config.models_dir / name, **changes)
        yield made


@pytest.fixture(scope="module")
def measured(service: PostTrainingService) -> str:
    with caller("ann"):
        job_id, code = run(service, MEASURE | {"model": "granite", "job_uuid": "measured"})
    assert code == COMPLETED, reason(folder_of(service, job_id))
    return job_id


@pytest.fixture(scope="module")
def ablated(service: PostTrainingService, measured: str) -> str:
    with caller("ann"):
        job_id, code = run(service, ABLATE | {"model": "granite", "job_uuid": "ablated"})
    assert code == COMPLETED, reason(folder_of(service, job_id))
    return job_id


def test_a_measurement_leaves_its_files(service: PostTrainingService, measured: str) -> None:
    with caller("ann"):
        artifacts = asyncio.run(service.artifacts(measured)).checkpoints
        files = {file.path for file in asyncio.run(service.artifact(measured, "measurements")).files}
        report = ask(service, "GET", f"/jobs/{measured}/artifacts/measurements/{DIRECTIONS_FILE}")
        detail = asyncio.run(service.detail(measured))
    assert [(each.kind, each.identifier) for each in artifacts] == [("analysis", "measured/measurements")]
    assert files >= {MEASUREMENTS_FILE, DIRECTIONS_FILE, "routing.json"}
    found = DirectionsReport.model_validate(report.json())
    assert {name: (each.source, each.rows) for name, each in found.provenance.sets.items()} == {
        "target": ("cooking", 7), "baseline": ("other", 9),
    }  # fmt: skip
    assert detail.summary is not None
    assert detail.summary["best_quality"] == max(each.quality for each in found.layers)


def test_an_ablation_leaves_a_model_that_the_next_job_names(service: PostTrainingService, ablated: str) -> None:
    folder = folder_of(service, ablated)
    report = AppliedReport.model_validate_json((folder.model / APPLIED_FILE).read_bytes())
    old = load_file(service.config.models_dir / "granite" / "model.safetensors")
    new = load_file(folder.model / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {each.name for each in report.touched}
    assert {each.kind for each in report.touched} == {"attention", "experts", "router"}
    spec = json.loads(folder.spec.read_text())
    assert (spec["resources"]["gpus"], spec["measurements"]) == (0, "measured")
    with caller("ann"):
        artifacts = asyncio.run(service.artifacts(ablated)).checkpoints
        routed = asyncio.run(service.validate(ANALYSIS | {"model": ablated})).spec
        trained = asyncio.run(service.validate(SFT | {"model": f"{ablated}/model"})).spec
        again, code = run(service, MEASURE | {"model": ablated, "job_uuid": "measured-again"})
    assert [(each.kind, each.identifier) for each in artifacts] == [("model", "ablated/model")]
    assert routed["model"] == trained["model"] == str(folder.model)
    assert code == COMPLETED, reason(folder_of(service, again))


def test_the_experts_of_a_routing_analysis(
    service: PostTrainingService, measured: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server puts them into the plan, and so does the command, from the report of the job or from a file."""
    asked = {"job": "analysis", "set": "a", "top": 2}
    with caller("ann"):
        job_id, code = run(service, ANALYSIS | {"model": "granite", "job_uuid": "analysis"})
    assert code == COMPLETED, reason(folder_of(service, job_id))
    report = folder_of(service, job_id).routing / REPORT_FILE
    report.write_text(report_of({(0, 3): 0.2, (1, 2): 0.4, (1, 0): 0.1}).model_dump_json())
    body = ABLATE | {"model": "granite", "from_analysis": asked}
    with caller("ann"):
        edited, code = run(service, body | {"job_uuid": "of-two-experts"})
    folder = folder_of(service, edited)
    assert code == COMPLETED, reason(folder)
    found = AppliedReport.model_validate_json((folder.model / APPLIED_FILE).read_bytes())
    assert found.plan.layer_experts == {"0": "3", "1": "2"}
    assert found.plan.layer_experts_from is not None
    assert {(each.layer, each.experts) for each in found.touched if each.kind == "experts"} == {(0, 1), (1, 1)}
    with caller("eve"), pytest.raises(NotFound):
        asyncio.run(service.validate(body))
    with caller("ann"), pytest.raises(InvalidInput, match=r"from_analysis\.set: 'z' is not valid; expected a set of"):
        asyncio.run(service.validate(body | {"from_analysis": asked | {"set": "z"}}))
    monkeypatch.setenv(STATE_VARIABLE, str(service.config.state_dir))
    file = tmp_path / "plan.json"
    for where in ({"job": "analysis"}, {"file": str(report)}):
        file.write_text(json.dumps(body | {"from_analysis": {"set": "a", "top": 2} | where}))
        plan = read_plan(str(file))
        assert (plan.from_analysis, plan.layer_experts) == (None, {"0": "3", "1": "2"})
    for where, told in (({"job": edited}, "from_analysis.job"), ({"job": "a", "file": "b"}, "one of job and file")):
        file.write_text(json.dumps(body | {"from_analysis": {"set": "a", "top": 2} | where}))
        with pytest.raises(InvalidInput, match=told):
            read_plan(str(file))


def test_the_experts_of_the_rows_that_were_measured(
    service: PostTrainingService, measured: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A measurement of a model with experts has a routing.json too, so that no second job needs to read its rows."""
    report = folder_of(service, measured).measurements / REPORT_FILE
    kept = report.read_text()
    report.write_text(report_of({(0, 1): 0.3, (1, 2): 0.4}).model_dump_json())
    body = ABLATE | {"model": "granite", "from_analysis": {"job": measured, "set": "a", "top": 2}}
    monkeypatch.setenv(STATE_VARIABLE, str(service.config.state_dir))
    (tmp_path / "plan.json").write_text(json.dumps(body))
    try:
        with caller("ann"):
            resolved = asyncio.run(service.validate(body)).spec
        assert resolved["layer_experts"] == read_plan(str(tmp_path / "plan.json")).layer_experts == {"0": "1", "1": "2"}
        report.unlink()
        with caller("ann"), pytest.raises(InvalidInput, match="a job of a model with experts with a readable report"):
            asyncio.run(service.validate(body))
    finally:
        report.write_text(kept)


@pytest.mark.wide
def test_an_edit_as_an_adapter(service: PostTrainingService, measured: str) -> None:
    """Its job leaves what a training job does: other jobs switch it on and off, and an export merges it."""
    body = ABLATE | {"model": "granite", "norm_preserving": "off"}
    evaluation = {"retain_dataset_id": "garden", "resamples": 100, "max_new_tokens": 4}
    lora = {"output": "lora", "training": {"dtype": "fp32"}, "eval": evaluation, "job_uuid": "as-lora"}
    with caller("ann"):
        (edited, code), (adapted, lora_code) = run(service, body), run(service, body | lora)
    model, folder = folder_of(service, edited), folder_of(service, adapted)
    assert (code, lora_code) == (COMPLETED, COMPLETED), reason(folder)
    report = AppliedReport.model_validate_json((folder.adapter / APPLIED_FILE).read_bytes())
    assert report.folder == str(folder.adapter), "not the hidden folder that it was written to"
    assert not folder.model.exists()
    assert json.loads((folder.evaluation / "eval.json").read_text())["measured"]["after"]["kl_to_base"]["low"] > 0
    with caller("ann"):
        artifacts = asyncio.run(service.artifacts(adapted)).checkpoints
        played = asyncio.run(service.validate({"recipe": "playground", "model": adapted})).spec
        routed = asyncio.run(service.validate(ANALYSIS | {"model": "granite", "adapter_folder": adapted})).spec
        with pytest.raises(InvalidInput, match="an adapter that a job has trained; an ablation's is on other"):
            asyncio.run(service.validate(SFT | {"model": adapted, "adapter": {"rank": 1}}))
        with pytest.raises(InvalidInput, match="norm_preserving: 'row' is not valid; expected off with output lora"):
            asyncio.run(service.validate(body | {"output": "lora", "norm_preserving": "row"}))
        exported, code = run(service, {"recipe": "export", "of": adapted, "export": {"merged": True}})
    assert (artifacts[0].kind, artifacts[0].identifier) == ("adapter", "as-lora/adapter")
    assert played["adapter_folder"] == routed["adapter_folder"] == str(folder.adapter)
    assert code == COMPLETED, reason(folder_of(service, exported))
    merged = load_file(folder_of(service, exported).artifacts / "merged" / "model.safetensors")
    wanted = load_file(model.model / "model.safetensors")
    assert merged.keys() == wanted.keys()
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in wanted)


def test_an_ablation_needs_its_measurement_until_it_has_completed(service: PostTrainingService, ablated: str) -> None:
    uses = uses_of(folder_of(service, ablated).read_spec(), service.config.jobs_dir)
    assert (uses.always, uses.to_complete) == ((), ("measured",))


def test_a_status_says_what_they_do(service: PostTrainingService, measured: str) -> None:
    from llama_stack_provider_moe.jobdir import events
    from llama_stack_provider_moe.jobdir.state import JobState

    for body, stage in ((MEASURE, "measuring"), (ABLATE, "editing")):
        with caller("ann"):
            job_id = asyncio.run(service.submit(body | {"model": "granite"})).job_uuid
        assert service.store.claim("me/1/1/1/1") is not None
        log = events.EventLog(folder_of(service, job_id).events)
        log.append(events.Step(step=1, max_steps=9, epoch=0.1, metrics={}))
        log.close()
        with caller("ann"):
            told = asyncio.run(service.status(job_id)).resources_allocated
        assert told is not None
        assert told["stage"] == stage
        service.store.move(job_id, JobState.FAILED, reason="over")


def test_what_the_server_refuses(service: PostTrainingService, measured: str, ablated: str) -> None:
    def refusal(body: dict[str, Any], kind: type[Exception] = InvalidInput) -> str:
        with caller("ann"), pytest.raises(kind) as caught:
            asyncio.run(service.validate({"model": "granite"} | body))
        return str(caught.value)

    assert "measurements: 'ablated' is not valid; expected a job of recipe 'ablation_measure'; this one has" in refusal(
        ABLATE | {"measurements": ablated}
    )
    assert "no-such-job" in refusal(ABLATE | {"measurements": "no-such-job"}, NotFound)
    assert "data.sets: 1 set(s) can't be compared" in refusal(MEASURE | {"data": {"sets": {"target": "cooking"}}})
    assert "at least 4 rows" in refusal(MEASURE | {"data": {"sets": {"target": "few", "baseline": "other"}}})
    with caller("ann"):
        waiting = asyncio.run(service.submit(MEASURE | {"model": "granite"})).job_uuid
        told = asyncio.run(service.validate(ABLATE | {"model": "granite", "measurements": waiting})).notes
        assert f"measurements: {waiting!r} is what job {waiting} will leave: this job waits for it" in told
        asyncio.run(service.cancel(waiting))
    assert "is cancelled; its measurements are available once it has completed" in refusal(
        ABLATE | {"measurements": waiting}, Conflict
    )
    with caller("eve"), pytest.raises(NotFound):
        asyncio.run(service.validate(ABLATE | {"model": "granite"}))


def test_measurements_of_another_model_fail_the_job(service: PostTrainingService, measured: str) -> None:
    with caller("ann"):
        job_id, code = run(service, ABLATE | {"model": "wide"})
    folder = folder_of(service, job_id)
    assert code == FAILED
    assert "expected measurements of this model, which has 2 blocks and is 64 wide" in reason(folder)
    assert not folder.model.exists()


def test_a_resolved_spec_is_submitted_unchanged(service: PostTrainingService, ablated: str) -> None:
    for job_id in ("measured", ablated):
        spec = json.loads(folder_of(service, job_id).spec.read_text())
        with caller("ann"):
            again = asyncio.run(service.validate(spec | {"job_uuid": None})).spec
        assert again | {"job_uuid": job_id} == spec


def test_defaults_of_a_server_do_not_disturb_them() -> None:
    defaults = JobDefaults.model_validate({"training": {"dtype": "fp32", "n_epochs": 2}, "optimizer": {"lr": 0.1}})
    assert defaults.under(MEASURE | {"training": {}})["training"] == {"dtype": "fp32"}
    assert "optimizer" not in defaults.under(MEASURE)
    assert defaults.under(ABLATE) == ABLATE | {"training": {"dtype": "fp32"}}
    measuring = JobDefaults.model_validate({"eval": {"retain_dataset_id": "garden", "max_rows": 9}})
    assert measuring.under(ABLATE) == ABLATE, "what every training job measures is not asked of other jobs"
    assert measuring.under(ABLATE | {"eval": {}})["eval"] == {"retain_dataset_id": "garden", "max_rows": 9}


def test_a_command_finds_the_measurements_of_a_job(
    service: PostTrainingService, measured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(service.config.state_dir))
    path = folder_of(service, measured).measurements / MEASUREMENTS_FILE
    assert measurements_file(measured, "measurements") == path
    assert measurements_file(str(path), "m") == measurements_file(str(path.parent), "m") == path
    with pytest.raises(InvalidInput, match=r"measurements: 'nothing' is not valid; expected a measurements\.saf"):
        measurements_file("nothing", "measurements")


def test_a_job_measures_before_and_after(service: PostTrainingService, measured: str) -> None:
    """Perplexity, KL to the base and the choices of routers; the limits of the gate are those of training jobs."""
    evaluation = {"retain_dataset_id": "garden", "refuse_dataset_id": "cooking", "resamples": 100, "max_new_tokens": 4}
    body = ABLATE | {"model": "granite", "training": {"dtype": "fp32"}, "eval": evaluation}
    with caller("ann"):
        job_id, code = run(service, body)
        artifacts = asyncio.run(service.artifacts(job_id)).checkpoints
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    assert [each.kind for each in artifacts] == ["model", "evaluation"]
    found = json.loads((folder.evaluation / "eval.json").read_text())
    before, after = found["measured"]["before"], found["measured"]["after"]
    assert set(before) == {"refusal_rate", "perplexity"}
    assert set(after) == {*before, "kl_to_base", "routing_shift"}
    assert after["kl_to_base"]["low"] > 0
    assert 0 < after["routing_shift"]["low"] <= after["routing_shift"]["value"] <= 1
    assert json.loads(folder.spec.read_text())["resources"]["gpus"] is None
    with caller("ann"):
        worse = {"ablate": [{"layer": "0-1", "measurement": 0, "scale": 2.0}], "norm_preserving": "off"}
        gated, code = run(service, body | worse | {"eval": evaluation | {"fail_if": {"capability_drop": 0}}})
    assert code == FAILED
    assert "eval.fail_if.capability_drop" in reason(folder_of(service, gated))
    failed = folder_of(service, gated)
    first = failed.before.read_bytes()
    with signals_put_back():
        assert train(failed) == FAILED, "a resumed job edits and measures again"
    assert failed.before.read_bytes() == first, "the base is not measured again"
    assert {each.kind for each in saved_artifacts(failed)} == {"model", "evaluation"}, "both are kept"
