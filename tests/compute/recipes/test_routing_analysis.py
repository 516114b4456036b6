"""Routing analysis as a job, from the request to its artifact, and to the plan of the next job."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, train
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Conflict, Forbidden, InvalidInput, InvalidRows, NotFound
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, JobDefaults, numbers
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, resolve_adapter
from tests.support import tiny_models
from tests.support.host_support import Datasets, ask, caller, folder_of, serving_in_process
from tests.support.training_support import signals_put_back

GARDEN = [{"prompt": f"Write {i} words about the garden.", "completion": "In spring."} for i in range(8)]
SUMS = [{"prompt": f"Add {i} and 3 4 5 6 7 8 9"} for i in range(9)]
ANALYSIS = {
    "recipe": "routing_analysis",
    "data": {"sets": {"garden": "garden", "sums": "sums"}},
    "analysis": {"resamples": 100, "permutations": 50, "top": 3},
    "training": {"dtype": "fp32"},
}
SFT: dict[str, Any] = {
    "recipe": "sft",
    "data": {"dataset_id": "garden"},
    "training": {"dtype": "fp32"},
    "options": {"validation_split": 0, "max_length": 64},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {"garden": GARDEN, "sums": SUMS}
    with serving_in_process(tmp_path_factory.mktemp("routing"), datasets) as made:
        for name, changes in {"granite": {}, "wide": {"num_local_experts": 8}}.items():
            tiny_models.build("granitemoe", made.config.models_dir / name, **changes)
        yield made


def run(service: PostTrainingService, body: dict[str, Any]) -> tuple[str, int]:
    """Submit a job and run it; its id and exit code."""
    job_id = asyncio.run(service.submit(body)).job_uuid
    folder = folder_of(service, job_id)
    with signals_put_back():
        code = train(folder)
    assert service.store.claim("me/1/1/1/1") is not None
    if code == COMPLETED:
        manifest = folder.read_manifest()
        assert manifest is not None
        service.store.move(job_id, JobState.COMPLETED, artifacts=tuple(manifest.artifacts))
    else:
        service.store.move(job_id, JobState.FAILED, reason=reason(folder))
    return job_id, code


def reason(folder: JobFolder) -> str:
    return "; ".join(event.reason for event in events.read(folder.events).events if event.type == "failed")


@pytest.fixture(scope="module")
def analysed(service: PostTrainingService) -> str:
    with caller("ann"):
        job_id, code = run(service, ANALYSIS | {"model": "granite", "job_uuid": "analysis"})
    assert code == COMPLETED, reason(folder_of(service, job_id))
    return job_id


def asking(**more: Any) -> dict[str, Any]:
    """An SFT job that trains the experts of an analysis."""
    found = {"job": "analysis", "set": "sums", "top": 2, "rank": 2} | more
    return SFT | {"model": "granite", "adapter": {"plan": "per_expert", "rank": 4, "from_analysis": found}}


def test_a_job_leaves_its_report_and_charts(service: PostTrainingService, analysed: str) -> None:
    folder = folder_of(service, analysed)
    assert {path.name for path in folder.data.glob("*.jsonl")} == {"set-garden.jsonl", "set-sums.jsonl"}
    assert json.loads(folder.rows("set-sums").read_text().splitlines()[0]) == {
        "messages": [{"role": "user", "content": SUMS[0]["prompt"]}]
    }
    with caller("ann"):
        artifacts = asyncio.run(service.artifacts(analysed)).checkpoints
        files = asyncio.run(service.artifact(analysed, "routing")).files
        detail = asyncio.run(service.detail(analysed))
    assert [(each.kind, each.identifier) for each in artifacts] == [("analysis", "analysis/routing")]
    assert {file.path for file in files} >= {REPORT_FILE, "difference.png", "rates.png"}
    report = RoutingReport.model_validate_json((folder.routing / REPORT_FILE).read_bytes())
    assert {name: each.rows for name, each in report.sets.items()} == {"garden": 8, "sums": 9}
    assert all(0 < len(ranked) <= 3 for ranked in report.top.values())
    assert detail.summary is not None
    assert detail.summary["experts_beyond_chance"] == sum(map(len, sure_ones(report).values()))
    assert detail.resources_allocated is not None
    assert detail.resources_allocated["percent"] == 100


def test_a_status_says_that_it_analyses(service: PostTrainingService) -> None:
    """For a training job it says that it trains, from the same events."""
    for body, stage in ((ANALYSIS, "analysing"), (SFT, "training")):
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


def test_over_http(service: PostTrainingService, analysed: str) -> None:
    with caller("ann"):
        report = ask(service, "GET", f"/jobs/{analysed}/artifacts/routing/{REPORT_FILE}")
        refused = ask(service, "POST", "/jobs", json=ANALYSIS | {"model": "granite", "data": {"sets": {"a": "garden"}}})
        checked = ask(service, "POST", "/jobs/validate", json=ANALYSIS | {"model": "granite"})
    assert set(report.json()["sets"]) == {"garden", "sums"}
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400, "data.sets: 1 set(s) can't be compared; expected 2 to 16",
    )  # fmt: skip
    assert checked.json()["rows"] == {"set-garden": 8, "set-sums": 9}
    assert (checked.json()["train_rows"], checked.json()["validation_rows"]) == (0, None)
    with caller("eve"):
        assert ask(service, "GET", f"/jobs/{analysed}/artifacts/routing/{REPORT_FILE}").status_code == 404


def test_its_experts_are_what_the_next_job_trains(service: PostTrainingService, analysed: str) -> None:
    with caller("ann"):
        job_id, code = run(service, asking())
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    report = RoutingReport.model_validate_json((folder_of(service, analysed).routing / REPORT_FILE).read_bytes())
    best = sure_ones(report)["sums"][:2]
    assert len(best) == 2
    adapter = json.loads(folder.spec.read_text())["adapter"]
    rules = [(int(rule["layers"]), e) for rule in adapter["rules"] for key in rule["experts"] for e in numbers(key)]
    assert sorted(rules) == sorted(best), "resolved when it is submitted"
    assert adapter["from_analysis"] is None
    assert adapter["rules_from"] == {
        "analysis": "job analysis, set sums, top 2", "moe_layers": [0, 1], "num_experts": 4,
    }  # fmt: skip
    assert any("job analysis, set sums, top 2: layer" in note for note in notes(folder))
    named = set()
    for name, tensor in load_file(folder.adapter / "adapter_model.safetensors").items():
        if ".experts." in name and "lora_A" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            has_rank = tensor.view(4, -1).abs().amax(dim=1)  # rows e * R + k; zeros where an expert has no rank
            named |= {(layer, expert) for expert in torch.nonzero(has_rank).flatten().tolist()}
    assert named == set(best)


def sure_ones(report: RoutingReport) -> dict[str, list[tuple[int, int]]]:
    return {name: [(one.layer, one.expert) for one in report.ranked(name) if one.is_sure] for name in report.sets}


def notes(folder: JobFolder) -> list[str]:
    found: list[str] = json.loads(folder.resolved.read_text())["adapter"]["notes"]
    return found


def test_own_rules_go_before_the_analysis(service: PostTrainingService, analysed: str) -> None:
    body = asking()
    body["adapter"]["rules"] = [{"experts": {"0-3": 8}}]
    with caller("ann"):
        spec = asyncio.run(service.validate(body)).spec
        again = asyncio.run(service.validate(spec | {"job_uuid": None})).spec
    assert spec["adapter"]["rules"][-1] == {"layers": None, "experts": {"0-3": 8}, "lr_multiplier": 1.0}
    assert len(spec["adapter"]["rules"]) >= 2
    assert again["adapter"] == spec["adapter"], "a resolved spec is submitted unchanged"


def test_an_adapter_of_a_job_can_be_analysed(service: PostTrainingService, analysed: str) -> None:
    lora = {"plan": "trunk", "rank": 4, "alpha": 64, "lora_attn_modules": ["q_proj"]}
    body = SFT | {"model": "granite", "adapter": lora, "moe": {"train_router": True}, "optimizer": {"lr": 0.5}}
    with caller("ann"):
        job_id, code = run(service, body)
        assert code == COMPLETED, reason(folder_of(service, job_id))
        found = {"model": "granite", "adapter_folder": str(folder_of(service, job_id).adapter)}
        with_adapter, code = run(service, ANALYSIS | found)
    assert code == COMPLETED, reason(folder_of(service, with_adapter))
    rates = [
        json.loads((folder_of(service, one).routing / REPORT_FILE).read_text())["layers"][1]["rate"]
        for one in (analysed, with_adapter)
    ]
    assert rates[0] != rates[1]
    with caller("eve"), pytest.raises(NotFound):
        asyncio.run(service.validate(ANALYSIS | found))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"set": "others"}, InvalidInput, "adapter.from_analysis.set: 'others' is not valid; expected a set"),
        ({"job": "nothing"}, NotFound, "nothing"),
        ({"job": "../analysis"}, InvalidInput, "adapter.from_analysis.job"),
        ({"job": "/etc/passwd"}, InvalidInput, "adapter.from_analysis.job"),
        ({"file": "/etc/passwd"}, InvalidInput, "adapter.from_analysis.file: unknown key"),
        ({"top": 0}, InvalidInput, "adapter.from_analysis.top: 0 is not valid; expected >= 1"),
    ],
)  # fmt: skip
def test_what_can_not_be_resolved(
    service: PostTrainingService, analysed: str, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with caller("ann"), pytest.raises(error) as caught:
        asyncio.run(service.validate(asking(**changes)))
    assert told in str(caught.value)


def test_jobs_of_others_of_other_kinds_and_unfinished_ones(service: PostTrainingService, analysed: str) -> None:
    with caller("eve"), pytest.raises(NotFound) as caught:
        asyncio.run(service.validate(asking()))
    with caller("eve"), pytest.raises(NotFound) as unknown:
        asyncio.run(service.validate(asking(job="nothing")))
    assert str(caught.value) == str(unknown.value).replace("nothing", "analysis"), "as if there were none"
    with caller("ann"):
        other = asyncio.run(service.submit(SFT | {"model": "granite", "job_uuid": "other-kind"})).job_uuid
        with pytest.raises(InvalidInput, match="'routing_analysis' or 'ablation_measure'; this one has recipe 'sft'"):
            asyncio.run(service.validate(asking(job=other)))
        waiting = asyncio.run(service.submit(ANALYSIS | {"model": "granite", "job_uuid": "waiting"})).job_uuid
        told = asyncio.run(service.validate(asking(job=waiting))).notes
        assert told == ["adapter.from_analysis.job: 'waiting' is what job waiting will leave: this job waits for it"]
        for job_id in (other, waiting):
            asyncio.run(service.cancel(job_id))
        with pytest.raises(Conflict, match="job 'waiting' is cancelled; its report is available once it has completed"):
            asyncio.run(service.validate(asking(job=waiting)))


def test_a_report_that_was_changed_into_a_link_is_not_read(service: PostTrainingService, analysed: str) -> None:
    report = folder_of(service, analysed).routing / REPORT_FILE
    kept = report.with_name("kept.json")
    report.rename(kept)
    try:
        for spoil in (lambda: report.symlink_to("/etc/passwd"), lambda: report.write_text("{}")):
            spoil()
            with caller("ann"), pytest.raises(InvalidInput, match="a job with a readable report"):
                asyncio.run(service.validate(asking()))
            report.unlink()
    finally:
        kept.rename(report)


def test_another_model_is_refused(service: PostTrainingService, analysed: str) -> None:
    with caller("ann"):
        job_id, code = run(service, asking() | {"model": "wide"})
    assert code == FAILED
    told = reason(folder_of(service, job_id))
    assert "is an analysis of another model, of 4 experts in layers 0-1; this one has 8 in layers 0-1" in told


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"data": {"sets": {"a": "garden"}}}, InvalidInput, "data.sets: 1 set(s) can't be compared; expected 2 to 16"),
        ({"data": {"sets": {"a": "garden", "../b": "sums"}}}, InvalidInput, "'../b' is not valid as a name"),
        ({"data": {"sets": {"a": "garden", "b": "one"}}}, InvalidInput, "data.sets.b: 'one' is not valid; expected at"),
        ({"data": {"sets": {"a": "garden", "b": "gone"}}}, NotFound, "no data set 'gone'"),
        ({"analysis": {"tokens": "response"}}, InvalidRows, "row 1: completion: is missing beside 'prompt'"),
        ({"optimizer": {"lr": 1}}, InvalidInput, "optimizer: unknown key"),
        ({"adapter_folder": "/etc"}, Forbidden, "adapter_folder: '/etc' is outside the folders"),
        ({"adapter_folder": "granite"}, InvalidInput, "a folder with a readable adapter_config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_answered_at_the_door(
    service: PostTrainingService, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with caller("ann"), pytest.raises(error) as caught:
        asyncio.run(service.validate(ANALYSIS | {"model": "granite"} | changes))
    assert told in str(caught.value)


def test_a_servers_defaults_are_those_that_an_analysis_reads() -> None:
    defaults = JobDefaults(training={"dtype": "fp32", "n_epochs": 3}, options={"max_hours": 1}, adapter={"rank": 4})
    body = {"recipe": "routing_analysis", "model": "m", "data": ANALYSIS["data"]}
    assert JOB_SPEC.validate_python(defaults.under(body)).training.dtype == "fp32"
    assert "adapter" not in defaults.under(body)
    assert defaults.under(body | {"recipe": "sft"})["adapter"] == {"rank": 4}


# The command line resolves a file on its own machine.


def test_a_file_in_a_template_becomes_rules(service: PostTrainingService, analysed: str, tmp_path: Path) -> None:
    report = folder_of(service, analysed).routing / REPORT_FILE
    (tmp_path / "found.json").write_bytes(report.read_bytes())
    body = asking(file="found.json")
    del body["adapter"]["from_analysis"]["job"]
    (tmp_path / "job.json").write_text(json.dumps(body))
    sent = read_template(str(tmp_path / "job.json"), [])["adapter"]
    with caller("ann"):
        by_job = asyncio.run(service.validate(asking())).spec["adapter"]
    assert sent["rules"] == by_job["rules"]
    assert sent["rules_from"] == by_job["rules_from"] | {"analysis": "found.json, set sums, top 2"}
    assert "from_analysis" not in sent
    with caller("ann"):
        spec = asyncio.run(service.validate(body | {"adapter": sent})).spec
    assert spec["adapter"]["rules"] == by_job["rules"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"file": "gone.json"}, "adapter.from_analysis.file"),
        ({"job": "analysis"}, "expected one of job and file"),
        ({"set": "others"}, "adapter.from_analysis.set: 'others' is not valid"),
        ({"top": "many"}, "adapter.from_analysis.top"),
        ({"rank": None}, "adapter.from_analysis.rank: None is not valid; expected a rank of 1 to 1024"),
    ],
)
def test_mistakes_in_a_template(
    service: PostTrainingService, analysed: str, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    report = folder_of(service, analysed).routing / REPORT_FILE
    found = {"file": str(report), "set": "sums", "top": 2, "rank": 2} | changes
    (tmp_path / "job.json").write_text(json.dumps({"adapter": {"plan": "per_expert", "from_analysis": found}}))
    with pytest.raises(InvalidInput) as caught:
        read_template(str(tmp_path / "job.json"), [])
    assert told in str(caught.value)


def test_experts_that_chance_explains_are_not_taken(service: PostTrainingService, analysed: str) -> None:
    report = RoutingReport.model_validate_json((folder_of(service, analysed).routing / REPORT_FILE).read_bytes())
    adapter = JOB_SPEC.validate_python(asking(top=100)).adapter
    taken = resolve_adapter(adapter, report, "adapter.from_analysis").rules
    assert sum(len(list(numbers(key))) for rule in taken for key in rule.experts) == len(sure_ones(report)["sums"]) < 8
    for layer in report.layers:
        layer.chance_difference["sums"] = [1.5] * 4
    with pytest.raises(InvalidInput, match="none whose difference is larger than chance can explain"):
        resolve_adapter(adapter, report, "adapter.from_analysis")
