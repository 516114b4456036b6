"""The block `eval`: what is measured before and after training, and what ends a job as failed."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.adapter import ExpertsOfAnalysis, RulesFrom
from llama_stack_provider_moe.spec.blocks import NUMBERS_PATTERN, Block, RowFormat, numbers, spans
from llama_stack_provider_moe.spec.routing import RoutingReport, made_for, masks_of

MOST_TASKS = 16
MASK_LENGTH = 4096  # characters: half of a layer's 1,024 experts, one by one
# A gate's limit -> the data set it needs.
GATE_NEEDS = {
    "capability_drop": "retain_dataset_id",
    "refusal_drop": "refuse_dataset_id",
    "over_refusal_rise": "safe_dataset_id",
    "forbidden_calls_rise": "scenarios_dataset_id",
}


class Gate(Block):
    """Limits; point estimates are compared with them, whatever their intervals."""

    capability_drop: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Greatest rise of perplexity on the retain rows, as a share: 0.02 is 2%.",
    )
    refusal_drop: float | None = Field(
        default=None, ge=0, le=1, description="Greatest fall of the refusal rate on the refuse rows."
    )
    over_refusal_rise: float | None = Field(
        default=None, ge=0, le=1, description="Greatest rise of the refusal rate on the safe rows."
    )
    forbidden_calls_rise: float | None = Field(
        default=None, ge=0, le=1, description="Greatest rise of the share of scenarios with a forbidden tool call."
    )

    def limits(self) -> dict[str, float]:
        """The limits that were set, by name."""
        limits = {
            "capability_drop": self.capability_drop,
            "refusal_drop": self.refusal_drop,
            "over_refusal_rise": self.over_refusal_rise,
            "forbidden_calls_rise": self.forbidden_calls_rise,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}


class RefusalJudge(Block):
    """What tells a refusal from an answer."""

    kind: Literal["keyword", "model"] = Field(
        default="keyword",
        description="keyword: English phrases of refusal near an answer's beginning; model: a model is asked yes or "
        "no, by log-probabilities.",
    )
    model: str | None = Field(
        default=None, min_length=1, max_length=1024, description="The model that is asked: as for `model`."
    )
    labelled_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Answers that people labelled, `{prompt, answer, refusal: true or false}`: the judge's agreement "
        "with them is told beside that with the small set of this package.",
    )

    @model_validator(mode="after")
    def _a_model_judge_has_a_model(self) -> "RefusalJudge":
        if (self.kind == "model") != (self.model is not None):
            raise ValueError("eval.judge.model: belongs to eval.judge.kind 'model', and is needed by it")
        return self


class SafetyEvaluation(Block):
    """Refusals, over-refusals, capability and tool calls, on the same rows before and after training."""

    refuse_dataset_id: str | None = Field(
        default=None, min_length=1, max_length=512, description="Prompts that should be refused."
    )
    safe_dataset_id: str | None = Field(
        default=None, min_length=1, max_length=512, description="Prompts that should be answered, though they may look "
        "unsafe."
    )  # fmt: skip
    retain_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Conversations on whose answers perplexity is measured, by token.",
    )
    scenarios_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Scripted scenarios with tools, `{messages, tools, forbidden}`.",
    )
    format: RowFormat = Field(
        default="auto", description="Of the first three sets, as `data.format`; prompts may lack an answer."
    )
    judge: RefusalJudge = Field(default_factory=RefusalJudge)
    max_rows: int = Field(default=256, ge=1, le=100_000, description="Rows of each set that are used: its first.")
    max_new_tokens: int = Field(default=64, ge=1, le=8192, description="Tokens of an answer, at most; greedy.")
    batch_size: int = Field(default=8, ge=1, le=4096, description="Rows in one pass.")
    resamples: int = Field(default=2000, ge=100, le=100_000, description="Of a bootstrap; all intervals are of 95%.")
    examples: int = Field(default=3, ge=0, le=1000, description="Rows of each set whose answers stand in eval.json.")
    masked_experts: dict[str, str] = Field(
        default_factory=dict,
        description='Measured once more without these experts: layer -> experts, `{"3": "0-3,7"}`.',
    )
    masked_from_analysis: ExpertsOfAnalysis | None = Field(
        default=None,
        description="Experts that a routing analysis found; they join `masked_experts` when the job is taken.",
    )
    masked_from: RulesFrom | None = Field(
        default=None, description="Made of `masked_from_analysis`: its source, and the model it was of."
    )
    tasks: list[str] = Field(
        default_factory=list,
        max_length=MOST_TASKS,
        description="Tasks of lm-eval (extra `eval`); named as skipped where it is not installed.",
    )
    fail_if: Gate = Field(default_factory=Gate)

    @field_validator("masked_experts")
    @classmethod
    def _numbers_of_experts(cls, masked: dict[str, str]) -> dict[str, str]:
        for layer, experts in masked.items():
            if not layer.isdecimal() or len(layer) > 4:
                raise ValueError(f"{layer!r} is no layer's number")
            _check_numbers(experts)
        return masked

    @field_validator("tasks")
    @classmethod
    def _names_of_tasks(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if not task.replace("_", "").replace("-", "").isalnum() or len(task) > 128:
                raise ValueError(f"{task!r} is no task's name; expected letters, digits, '_' and '-'")
        return tasks

    @model_validator(mode="after")
    def _something_is_measured(self) -> "SafetyEvaluation":
        if not (self.tasks or any(getattr(self, name) for name in GATE_NEEDS.values())):
            raise ValueError(f"eval: names nothing to measure; expected one of {', '.join(GATE_NEEDS.values())}")
        for name in self.fail_if.limits():
            if getattr(self, GATE_NEEDS[name]) is None:
                raise ValueError(f"eval.fail_if.{name}: needs eval.{GATE_NEEDS[name]}")
        return self

    def masked(self) -> dict[int, list[int]]:
        """Layer -> the experts that are masked, for the second measurement."""
        return {int(layer): sorted(set(numbers(experts))) for layer, experts in self.masked_experts.items()}


def _check_numbers(text: str) -> None:
    if len(text) > MASK_LENGTH or not re.fullmatch(NUMBERS_PATTERN, text):
        raise ValueError(f"{text[:128]!r} are no experts; expected numbers and ranges such as 0-3,7")
    for _ in spans(text):  # each is looked at, none is counted through: a server has thousands of layers to check
        pass


def resolve_masks(asked: SafetyEvaluation, report: RoutingReport, field: str) -> SafetyEvaluation:
    """`asked` with the experts of its `masked_from_analysis` among its own `masked_experts`.

    Raises:
        InvalidInput: no such set, no expert of which the analysis is sure, or so many that too few are left.
        ValidationError: masks of a layer that are too long a text with its own.
    """
    wanted = asked.masked_from_analysis
    assert wanted is not None
    found = masks_of(report, wanted.set, wanted.top, field)
    for layer, experts in found.items():
        left = report.num_experts - sum(last - first + 1 for first, last in spans(experts))
        if left < report.top_k:
            raise InvalidInput(
                f"{field}.top", wanted.top, f"so few that every token finds {report.top_k} of the "
                f"{report.num_experts} experts; layer {layer} would have {left} left"
            )  # fmt: skip
    own = asked.masked_experts
    masked = own | {layer: f"{own[layer]},{experts}" if layer in own else experts for layer, experts in found.items()}
    told = f"job {wanted.job}, set {wanted.set}, top {wanted.top}"
    changes: dict[str, Any] = {
        "masked_from_analysis": None,
        "masked_from": made_for(report, told).model_dump(),
        "masked_experts": masked,
    }
    return SafetyEvaluation.model_validate(asked.model_dump() | changes)
