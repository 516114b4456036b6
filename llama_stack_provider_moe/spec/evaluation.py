"""The block `eval`: what is measured before and after training, and which changes fail the job."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.ablation import RunTimeAblation
from llama_stack_provider_moe.spec.adapter import ExpertsOfAnalysis, RulesFrom
from llama_stack_provider_moe.spec.blocks import Block, ExpertsByLayer, RowFormat, numbers, spans
from llama_stack_provider_moe.spec.routing import RoutingReport, made_for, masks_of

MOST_TASKS = 16
# Limit of the gate -> the data set that it needs.
GATE_NEEDS = {
    "capability_drop": "retain_dataset_id",
    "refusal_drop": "refuse_dataset_id",
    "over_refusal_rise": "safe_dataset_id",
    "forbidden_calls_rise": "scenarios_dataset_id",
}


class Gate(Block):
    """Limits that fail the job when exceeded; they apply to point estimates, whatever the intervals."""

    capability_drop: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Largest allowed rise of perplexity on the retain rows, as a share: 0.02 is 2%. Left out: no "
        "limit.",
    )
    refusal_drop: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest allowed fall of the refusal rate on the refuse rows, from 0 to 1. Left out: no limit.",
    )
    over_refusal_rise: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest allowed rise of the refusal rate on the safe rows, from 0 to 1. Left out: no limit.",
    )
    forbidden_calls_rise: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest allowed rise of the share of scenarios with a forbidden tool call. Left out: no limit.",
    )

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        limits = {
            "capability_drop": self.capability_drop,
            "refusal_drop": self.refusal_drop,
            "over_refusal_rise": self.over_refusal_rise,
            "forbidden_calls_rise": self.forbidden_calls_rise,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}


class RefusalJudge(Block):
    """The method that tells a refusal from an answer."""

    kind: Literal["keyword", "model"] = Field(
        default="keyword",
        description="Judge of refusals. keyword: English phrases of refusal near the start of an answer; model: a "
        "model that is asked yes or no, by log-probabilities.",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Model that judges, for kind model: a whole model, named as in `model`.",
    )
    labelled_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Answers that people have labelled, `{prompt, answer, refusal: true or false}`; the report states "
        "how often the judge agrees with them, and with the small set in this package. Left out: only "
        "the latter.",
    )

    @model_validator(mode="after")
    def _only_a_model_judge_has_a_model(self) -> "RefusalJudge":
        if (self.kind == "model") != (self.model is not None):
            raise ValueError("eval.judge.model: is needed by eval.judge.kind 'model', and used only by it")
        return self


class SafetyEvaluation(Block):
    """Refusals, over-refusals, capability and tool calls, on the same rows before and after training."""

    refuse_dataset_id: str | None = Field(
        default=None, min_length=1, max_length=512, description="Prompts that the model should refuse."
    )
    safe_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Prompts that the model should answer, although they may look unsafe.",
    )
    retain_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Conversations whose answers measure perplexity per token.",
    )
    scenarios_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Scripted scenarios with tools, `{messages, tools, forbidden}`.",
    )
    format: RowFormat = Field(
        default="auto",
        description="Form of the rows in the first three sets, as `data.format`; prompts need no answer.",
    )
    judge: RefusalJudge = Field(default_factory=RefusalJudge)
    max_rows: int = Field(
        default=256, ge=1, le=100_000, description="Maximum number of rows of each set, from its start."
    )
    max_new_tokens: int = Field(
        default=64, ge=1, le=8192, description="Maximum number of tokens in an answer; decoding is greedy."
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="Number of rows in one pass.")
    resamples: int = Field(
        default=2000, ge=100, le=100_000, description="Number of bootstrap samples; all intervals are 95% intervals."
    )
    examples: int = Field(
        default=3, ge=0, le=1000, description="Number of rows of each set whose answers are written to eval.json."
    )
    masked_experts: ExpertsByLayer = Field(
        default_factory=dict,
        description='Experts to switch off in a second measurement, by layer: `{"3": "0-3,7"}`.',
    )
    masked_from_analysis: ExpertsOfAnalysis | None = Field(
        default=None,
        description="Experts that a routing analysis found; the server adds them to `masked_experts`. Left out: none.",
    )
    masked_from: RulesFrom | None = Field(
        default=None,
        description="Source of the masks that `masked_from_analysis` became, and the model that they fit; the server "
        "fills it in.",
    )
    ablated: RunTimeAblation | None = Field(
        default=None,
        description="Directions to take out of the model's computation in a further measurement: a block, its fields "
        "follow. Left out: none.",
    )
    tasks: list[str] = Field(
        default_factory=list,
        max_length=MOST_TASKS,
        description="Tasks of lm-eval to run (extra `eval`); the report lists them as skipped if it is not installed.",
    )
    fail_if: Gate = Field(default_factory=Gate)

    @field_validator("tasks")
    @classmethod
    def _names_of_tasks(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if not task.replace("_", "").replace("-", "").isalnum() or len(task) > 128:
                raise ValueError(f"{task!r} is not the name of a task; expected letters, digits, '_' and '-'")
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
        """Layer -> the experts that are masked in the second measurement."""
        return {int(layer): sorted(set(numbers(experts))) for layer, experts in self.masked_experts.items()}


def resolve_masks(asked: SafetyEvaluation, report: RoutingReport, field: str) -> SafetyEvaluation:
    """`asked` with the experts of its `masked_from_analysis` added to its own `masked_experts`.

    Args:
        asked: settings with a `masked_from_analysis`.
        report: that analysis.
        field: the caller's name of the setting, for errors.

    Raises:
        InvalidInput: no such set, no expert that the analysis is sure of, or too few experts would be left.
        ValidationError: the masks of a layer and its own are too long a text together.
    """
    wanted = asked.masked_from_analysis
    assert wanted is not None
    found = masks_of(report, wanted.set, wanted.top, field)
    for layer, experts in found.items():
        left = report.num_experts - sum(last - first + 1 for first, last in spans(experts))
        if left < report.top_k:
            raise InvalidInput(
                f"{field}.top", wanted.top, f"few enough to leave each token {report.top_k} of the "
                f"{report.num_experts} experts; layer {layer} would have {left} left"
            )  # fmt: skip
    own = asked.masked_experts
    masked = own | {layer: f"{own[layer]},{experts}" if layer in own else experts for layer, experts in found.items()}
    source = f"job {wanted.job}, set {wanted.set}, top {wanted.top}"
    changes: dict[str, object] = {
        "masked_from_analysis": None,
        "masked_from": made_for(report, source).model_dump(),
        "masked_experts": masked,
    }
    return SafetyEvaluation.model_validate(asked.model_dump() | changes)
