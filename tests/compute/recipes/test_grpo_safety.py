"""A safety reward's job ends with one report of refusals, over-refusals and capability, of the model as it is saved."""

import json
import math
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.evaluation.generate import Limits, LocalModel, ends_of
from llama_stack_provider_moe.compute.evaluation.report import EvaluationReport
from llama_stack_provider_moe.compute.recipes.grpo.safety import tell_unmeasured
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.spec import JOB_SPEC, GRPOSpec
from tests.support import tiny_models
from tests.support.training_support import Run, Workshop, kept_rows, prompt_rows, workshop

__all__ = ["workshop"]

SETS = {"refuse_dataset_id": "never", "safe_dataset_id": "looks", "retain_dataset_id": "kept"}
BY_CLASS = [
    {"grader": {"type": "length", "name": "short", "unit": "characters", "most": 4, "margin": 40}, "prompts": "refuse"},
    {"grader": {"type": "length", "name": "long", "unit": "characters", "least": 30, "margin": 30}, "prompts": "help"},
]


def spec(reward: list[dict[str, Any]], **blocks: Any) -> GRPOSpec:
    found = JOB_SPEC.validate_python({"recipe": "grpo", "model": "a/b", "data": {"dataset_id": "d"}, "reward": reward,
                                      "training": {"batch_size": 8}, **blocks})  # fmt: skip
    assert isinstance(found, GRPOSpec)
    return found


@pytest.mark.parametrize(
    ("reward", "blocks", "lacking"),
    [
        (BY_CLASS, {}, "refusal, over-refusal, capability (perplexity) before and after training: the job names no "
                       "eval.refuse_dataset_id, eval.safe_dataset_id, eval.retain_dataset_id"),
        (BY_CLASS, {"eval": {"refuse_dataset_id": "x", "retain_dataset_id": "y"}}, "over-refusal before and after "
                   "training: the job names no eval.safe_dataset_id"),
        (BY_CLASS, {"eval": SETS}, None),
        ([{"grader": BY_CLASS[0]["grader"]}], {}, None),
    ],
)  # fmt: skip
def test_what_no_report_will_measure_is_told(
    reward: list[dict[str, Any]], blocks: dict[str, Any], lacking: str | None
) -> None:
    told: list[str] = []
    tell_unmeasured(spec(reward, **blocks), told.append)
    assert told == (
        [] if lacking is None else [f"reward: has classes of prompts, and no report will measure {lacking}"]
    )


def test_one_report_has_refusals_over_refusals_and_capability(workshop: Workshop) -> None:
    """Its perplexity is that of plain models: neither the temperature of answers nor replay reaches it."""
    rows = prompt_rows(8)
    for at, row in enumerate(rows):
        row["item"]["class"] = "help" if at % 2 else "refuse"
    folder = workshop.job(
        "grpo", "granitemoe", rows, rows[:2], reward=BY_CLASS, optimizer={"lr": 3e-2},
        rl={"temperature": 0.5, "routing_replay": "rollout"}, options={"eval_before_training": False},
        eval={**SETS, "max_new_tokens": 4, "resamples": 100},
    )  # fmt: skip
    retained = kept_rows(3)
    for name, content in (("refuse", prompt_rows(3)), ("safe", prompt_rows(2, first=9)), ("retain", retained)):
        lines = [json.dumps({"messages": row["messages"]}) + "\n" for row in content]
        folder.rows(f"eval-{name}").write_text("".join(lines), encoding="utf-8")
    run = workshop.again(Run(folder, 0))
    assert run.exit_code == COMPLETED, run.reason
    (kept,) = [each for each in run.manifest.artifacts if each.kind == "evaluation"]
    report = EvaluationReport.model_validate_json((folder.evaluation / "eval.json").read_text(encoding="utf-8"))
    assert kept.path == str(folder.evaluation)
    assert report.rows == {"refuse": 3, "safe": 2, "retain": 3}
    figures = {"refusal_rate": 3, "over_refusal_rate": 2}
    for state in ("before", "after"):
        assert {name: report.measured[state][name].n for name in figures} == figures
    assert {*figures, "perplexity_ratio"} <= report.differences["after - before"].keys()
    early, late = run.events("assessed")
    assert (early.step, late.step) == (0, 2)
    assert late.measured["after"]["perplexity"]["value"] == report.measured["after"]["perplexity"].value
    base = AutoModelForCausalLM.from_pretrained(workshop.model("granitemoe")).eval()
    wanted = {"before": perplexity(base, retained)}
    wanted["after"] = perplexity(PeftModel.from_pretrained(base, folder.adapter).eval(), retained)
    found = {state: report.measured[state]["perplexity"].value for state in wanted}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted["after"] - wanted["before"]) > 1e-2


def perplexity(model: Any, rows: list[Any]) -> float:
    """Of a plain model's answers."""
    subject = LocalModel(model, tiny_models.tokenizer(), Limits(3, 4, 96), ends_of(model), None, lambda *_: None)
    nll, tokens = subject.likelihoods("retain", rows)
    return math.exp(sum(nll) / sum(tokens))
