"""Experts that a routing analysis found, masked in a job's evaluation: on submission, in a template, in the job."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.evaluation.command import main
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.control.cli.template import read_template
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput, NotFound
from llama_stack_provider_moe.spec import SafetyEvaluation
from llama_stack_provider_moe.spec.adapter import ExpertsOfAnalysis
from llama_stack_provider_moe.spec.evaluation import resolve_masks
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport
from tests.compute.recipes.test_routing_analysis import GARDEN, SFT, analysed, reason, run, service, sure_ones
from tests.support.host_support import caller, folder_of
from tests.support.routing_reports import report_of

__all__ = ["analysed", "service"]

FIELD = "eval.masked_from_analysis"


def asking(evaluation: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """An SFT job whose evaluation masks what an analysis found."""
    found = {"job": "analysis", "set": "garden", "top": 1} | more
    block = {"retain_dataset_id": "garden", "resamples": 100, "masked_from_analysis": found, **(evaluation or {})}
    return SFT | {"model": "granite", "adapter": {"plan": "trunk", "rank": 4}, "eval": block}


def wanted(top: int, masked: dict[str, str] | None = None) -> SafetyEvaluation:
    asked = ExpertsOfAnalysis(job="j", set="a", top=top)
    return SafetyEvaluation(retain_dataset_id="d", masked_from_analysis=asked, masked_experts=masked or {})


def test_the_best_experts_join_the_jobs_own() -> None:
    report = report_of({(0, 3): 0.2, (1, 2): 0.4, (1, 0): 0.3}, unsure={(0, 1)})
    found = resolve_masks(wanted(2), report, FIELD)
    assert found.masked() == {1: [0, 2]}, "the unsure one has the greatest difference, and is not among them"
    assert found.masked_from_analysis is None
    assert found.masked_from is not None
    assert found.masked_from.model_dump() == {
        "analysis": "job j, set a, top 2", "moe_layers": [0, 1], "num_experts": 4,
    }  # fmt: skip
    assert resolve_masks(wanted(9, {"0": "0-1", "1": "0"}), report, FIELD).masked() == {0: [0, 1, 3], 1: [0, 2]}


def test_masking_too_many_experts_is_refused() -> None:
    report = report_of({(0, 0): 0.4, (0, 1): 0.3, (0, 2): 0.2})
    assert resolve_masks(wanted(2), report, FIELD).masked() == {0: [0, 1]}
    with pytest.raises(InvalidInput, match=r"top: 3 is not valid; .* leave each token 2 of the 4 experts; layer 0"):
        resolve_masks(wanted(3), report, FIELD)


def test_half_of_1024_experts_fit_into_a_layers_text() -> None:
    scattered = {(0, expert): 0.3 for expert in range(0, 1024, 2)}
    found = resolve_masks(wanted(1024), report_of(scattered, layers=1, experts=1024), FIELD)
    assert found.masked() == {0: list(range(0, 1024, 2))}


def test_a_job_measures_without_the_experts_of_its_analysis(
    service: PostTrainingService, analysed: str, tmp_path: Path
) -> None:
    """`moe-train eval` with the same report measures the same."""
    report_file = folder_of(service, analysed).routing / REPORT_FILE
    best = sure_ones(RoutingReport.model_validate_json(report_file.read_bytes()))["garden"][0]
    with caller("ann"):
        job_id, code = run(service, asking())
    folder = folder_of(service, job_id)
    assert code == COMPLETED, reason(folder)
    found = json.loads((folder.evaluation / "eval.json").read_text())
    assert found["masked_experts"] == {str(best[0]): [best[1]]}
    assert found["masked_from"] == "job analysis, set garden, top 1"
    assert set(found["measured"]) == {"before", "before_masked", "after", "after_masked"}
    told = f"eval: measures a second time without experts of layer {best[0]}: {best[1]} (with those of job analysis"
    assert told in folder.events.read_text()
    rows = tmp_path / "garden.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in GARDEN))
    code = main([
        str(service.config.models_dir / "granite"), "--retain", str(rows), "--mask-from", str(report_file),
        "--mask-set", "garden", "--mask-top", "1", "--dtype", "fp32", "--max-length", "64", "--resamples", "100",
        "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 0
    alone = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert alone["masked_from"] == "routing.json, set garden, top 1"
    masked, before = (found["measured"][state]["perplexity"]["value"] for state in ("before_masked", "before"))
    assert masked != before
    assert alone["measured"]["before_masked"]["perplexity"]["value"] == pytest.approx(masked)


def test_resolved_masks_are_submitted_unchanged(service: PostTrainingService, analysed: str) -> None:
    with caller("ann"):
        spec = asyncio.run(service.validate(asking({"masked_experts": {"0": "3"}}))).spec
        again = asyncio.run(service.validate(spec | {"job_uuid": None})).spec
    assert again["eval"] == spec["eval"]
    assert spec["eval"]["masked_from_analysis"] is None


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"set": "others"}, InvalidInput, f"{FIELD}.set: 'others' is not valid; expected a set"),
        ({"job": "nothing"}, NotFound, "nothing"),
        ({"job": "../analysis"}, InvalidInput, f"{FIELD}.job"),
        ({"rank": 3}, InvalidInput, f"{FIELD}.rank: unknown key"),
        ({"top": 0}, InvalidInput, f"{FIELD}.top: 0 is not valid; expected >= 1"),
    ],
)
def test_masks_that_can_not_be_resolved(
    service: PostTrainingService, analysed: str, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with caller("ann"), pytest.raises(error) as caught:
        asyncio.run(service.validate(asking(**changes)))
    assert told in str(caught.value)
    with caller("eve"), pytest.raises(NotFound):
        asyncio.run(service.validate(asking() | {"model": "granite"}))


def test_another_model_is_refused_before_it_trains(service: PostTrainingService, analysed: str) -> None:
    with caller("ann"):
        job_id, code = run(service, asking() | {"model": "wide"})
    assert code == FAILED
    told = reason(folder_of(service, job_id))
    assert told.startswith(
        "eval.masked_from: 'job analysis, set garden, top 1' is an analysis of another model, of 4 ex"
    )


# The command line resolves a file on its own machine.


def test_a_file_in_a_template_becomes_masks(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(report_of({(0, 3): 0.2, (1, 2): 0.4}).model_dump_json())
    block = {"retain_dataset_id": "d", "masked_from_analysis": {"file": "found.json", "set": "a", "top": 9}}
    (tmp_path / "job.json").write_text(json.dumps({"eval": block}))
    sent = SafetyEvaluation.model_validate(read_template(str(tmp_path / "job.json"), [])["eval"])
    assert sent.masked_experts == {"0": "3", "1": "2"}
    assert sent.masked_from is not None
    assert sent.masked_from.analysis == "found.json, set a, top 9"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"masked_from_analysis": {"file": "gone.json", "set": "a", "top": 1}}, f"{FIELD}.file"),
        ({"masked_from_analysis": {"file": "f", "job": "j", "set": "a", "top": 1}}, "expected one of job and file"),
        ({"masked_from_analysis": {"file": "f", "set": "a"}}, f"{FIELD}.top"),
        ({"masked_experts": {"0": "1"}, "masked_from_analysis": {"file": "f"}}, "expected nothing beside"),
    ],
)
def test_mistakes_in_a_template(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"eval": changes}))
    with pytest.raises(InvalidInput) as caught:
        read_template(str(tmp_path / "job.json"), [])
    assert told in str(caught.value)
