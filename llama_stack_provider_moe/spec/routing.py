"""The blocks of a routing analysis, its report, and the rules of plan `per_expert` that are made from the report.

The report's form is defined here, without torch, because the server and the command line read it too.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.spec.adapter import Adapter, ExpertRule, RulesFrom
from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, Block, DType, RowFormat, ranges

TokenChoice = Literal["prompt", "response", "all"]
SET_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
MOST_SETS = 16
Share = Annotated[float, Field(ge=-2, le=2)]  # a share of tokens, or the difference of two
Nats = Annotated[float, Field(ge=-1000, le=1000)]
Number = Annotated[int, Field(ge=0, le=65536)]
Count = Annotated[int, Field(ge=0, le=10**15)]
REPORT_FILE = "routing.json"


class AnalysisData(Block):
    """Which rows to compare."""

    sets: dict[str, str] = Field(
        description='Data sets to compare, two or more, each under a name of your choice: `{"a": "my-prompts", "b": '
        "...}`."
    )
    format: RowFormat = Field(
        default="auto",
        description="Form of the rows, as in other jobs. Rows without an answer are valid too (`prompt` alone, or "
        "messages that end with the user's), unless `analysis.tokens` is response.",
    )

    @field_validator("sets")
    @classmethod
    def _named_and_enough(cls, sets: dict[str, str]) -> dict[str, str]:
        if not 2 <= len(sets) <= MOST_SETS:
            raise ValueError(f"{len(sets)} set(s) can't be compared; expected 2 to {MOST_SETS}")
        for name, dataset_id in sets.items():
            if not re.fullmatch(SET_PATTERN, name):
                raise ValueError(f"{name!r} is not valid as a name; expected 1 to 32 letters, digits, '_' and '-', the "
                                 "first a letter or a digit")  # fmt: skip
            if not 1 <= len(dataset_id) <= 512:
                raise ValueError(f"{name}: is not valid; expected a data set's id of 1 to 512 characters")
        return sets


class AnalysisTraining(Block):
    """Settings of the forward passes; nothing is trained."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="Number of rows in one pass.")
    dtype: DType = Field(default="bf16", description="Data type of the model's parameters.")


class AnalysisOptions(Block):
    """The options of a job that an analysis uses."""

    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of the resampling.")
    max_length: int = Field(
        default=1024, ge=8, le=1 << 20, description="Maximum number of tokens of a row; the first ones are used."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; default: the model's own."
    )


class WholeRowOptions(AnalysisOptions):
    """The options of a job that reads the end of each row, and so can't cut it."""

    max_length: int = Field(
        default=1024, ge=8, le=1 << 20, description="Maximum number of tokens of a row; longer ones are refused."
    )


class Analysis(Block):
    """What to count, and how to measure its uncertainty."""

    tokens: TokenChoice = Field(
        default="all", description="Tokens to count: the prompt's, the answers', or both; never padding."
    )
    top: int = Field(default=20, ge=1, le=10000, description="Number of experts to list for each set.")
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="Confidence of each interval, as a share: 0.95 is 95%."
    )
    resamples: int = Field(
        default=1000,
        ge=100,
        le=10000,
        description="Number of bootstrap samples of each set's rows (percentile intervals).",
    )
    permutations: int = Field(
        default=200,
        ge=20,
        le=10000,
        description="Number of random shuffles of rows among sets, to measure the differences that chance alone "
        "causes.",
    )


class SetSummary(Block):
    """One data set, and how much of it was counted."""

    source: str = Field(description="Id of the data set, or its file.")
    rows: Count
    tokens: Count = Field(description="Number of tokens that count.")


class LayerReport(Block):
    """One layer; each list has one entry per expert, each dict one per set."""

    layer: Number
    rate: dict[str, list[Share]] = Field(description="Share of a set's tokens that were routed to the expert.")
    difference: dict[str, list[Share]] = Field(description="Rate minus the mean rate of the other sets.")
    low: dict[str, list[Share]] = Field(description="Lower end of the interval of the difference.")
    high: dict[str, list[Share]] = Field(description="Upper end of the interval of the difference.")
    chance_difference: dict[str, list[Share]] = Field(
        description="Limit that the difference must exceed: when rows are shuffled among sets, no expert of any layer "
        "exceeds it, at `confidence`."
    )
    mutual_information: Nats = Field(
        description="Mutual information of set and expert in nats, with equal weight for each set: from 0, if all "
        "sets are routed alike, to ln(sets)."
    )
    chance_mean: Nats = Field(
        description="Mean mutual information when rows are shuffled among sets: the bias of the estimate."
    )
    chance_high: Nats = Field(description="Quantile of that mutual information at `confidence`.")
    random_router: Nats | None = Field(
        default=None,
        description="Mutual information that a random linear router shows on the same hidden states; null: not "
        "measured.",
    )


class RankedExpert(Block):
    """One of a set's experts, ranked by difference."""

    layer: Number
    expert: Number
    rate: Share
    difference: Share
    low: Share
    high: Share
    is_sure: bool = Field(
        description="Whether the interval is above 0 and the difference is larger than chance can explain."
    )


class RoutingReport(Block):
    """The result of a routing analysis."""

    kind: Literal["routing_analysis"] = "routing_analysis"
    version: Literal[1] = 1
    model: str
    adapter: str | None
    family: str
    moe_layers: list[Number] = Field(min_length=1)
    num_experts: int = Field(ge=1, le=65536)
    top_k: Number
    tokens: TokenChoice
    confidence: Share
    resamples: Count
    permutations: Count
    seed: Count
    sets: dict[str, SetSummary]
    layers: list[LayerReport]
    top: dict[str, list[RankedExpert]] = Field(description="Experts that each set uses more than the other sets do.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "RoutingReport":
        if [layer.layer for layer in self.layers] != self.moe_layers:
            raise ValueError("layers differ from moe_layers")
        for layer in self.layers:
            for by_set in (layer.rate, layer.difference, layer.low, layer.high, layer.chance_difference):
                if set(by_set) != set(self.sets) or any(len(row) != self.num_experts for row in by_set.values()):
                    raise ValueError(f"layer {layer.layer} does not have {self.num_experts} experts for each set")
        return self

    def ranked(self, name: str) -> list[RankedExpert]:
        """Every expert of every layer, by how much more set `name` uses it than the other sets do."""
        found = [
            RankedExpert(
                layer=layer.layer,
                expert=expert,
                rate=layer.rate[name][expert],
                difference=layer.difference[name][expert],
                low=layer.low[name][expert],
                high=layer.high[name][expert],
                is_sure=layer.low[name][expert] > 0
                and layer.difference[name][expert] > layer.chance_difference[name][expert],
            )
            for layer in self.layers
            for expert in range(self.num_experts)
        ]
        return sorted(found, key=lambda one: (-one.difference, one.layer, one.expert))


def read_report(path: Path, field: str) -> RoutingReport:
    """A routing.json on this machine, for the command line.

    Raises:
        InvalidInput: the file is not a routing analysis.
    """
    try:
        return RoutingReport.model_validate_json(read_small(path, 256 << 20), extra="ignore")
    except (OSError, ValueError) as error:
        raise InvalidInput(field, str(path), f"a routing analysis ({type(error).__name__})") from None


def rules_of(report: RoutingReport, name: str, top: int, rank: int, field: str) -> list[ExpertRule]:
    """Rules for the `top` experts that set `name` surely uses more than the other sets do, by layer.

    Args:
        report: an analysis.
        name: of one of its sets.
        top: maximum number of experts, of those that the analysis is sure of.
        rank: of their LoRA.
        field: the caller's name of the block, for errors.

    Raises:
        InvalidInput: no such set, or no expert that the analysis is sure of.
    """
    chosen = chosen_experts(report, name, top, field)
    return [
        ExpertRule(layers=str(layer), experts=dict.fromkeys(_texts(experts), rank)) for layer, experts in chosen.items()
    ]


def masks_of(report: RoutingReport, name: str, top: int, field: str) -> dict[str, str]:
    """The same experts in the form of `eval.masked_experts`: layer -> `0-3,7`.

    Args:
        report: an analysis.
        name: of one of its sets.
        top: maximum number of experts.
        field: the caller's name of the block, for errors.

    Raises:
        InvalidInput: see `rules_of`.
    """
    chosen = chosen_experts(report, name, top, field)
    return {str(layer): ",".join(ranges(experts)) for layer, experts in chosen.items()}


def chosen_experts(report: RoutingReport, name: str, top: int, field: str) -> dict[int, list[int]]:
    """Layer -> experts, both in ascending order.

    Args:
        report: an analysis.
        name: of one of its sets.
        top: maximum number of experts.
        field: the caller's name of the block, for errors.

    Raises:
        InvalidInput: see `rules_of`.
    """
    if name not in report.sets:
        raise InvalidInput(f"{field}.set", name, f"a set of the analysis: {', '.join(map(repr, report.sets))}")
    # Of thousands of experts, hundreds have intervals above 0 by chance alone, and these rank highest.
    chosen = [one for one in report.ranked(name) if one.is_sure][:top]
    if not chosen:
        raise InvalidInput(
            f"{field}.set", name, "a set with experts that it surely uses more than the other sets do; this one has "
            "none whose difference is larger than chance can explain and whose interval is above 0"
        )  # fmt: skip
    return {
        layer: sorted(one.expert for one in chosen if one.layer == layer)
        for layer in sorted({one.layer for one in chosen})
    }


def made_for(report: RoutingReport, analysis: str) -> RulesFrom:
    """The source of the rules, and the model that they fit."""
    return RulesFrom(analysis=analysis, moe_layers=report.moe_layers, num_experts=report.num_experts)


def resolve_adapter(adapter: Adapter, report: RoutingReport, field: str) -> Adapter:
    """`adapter` with the experts of its `from_analysis` as rules, before its own rules, which override them.

    Raises:
        InvalidInput: see `rules_of`; or its own rules name experts that the model does not have.
    """
    asked = adapter.from_analysis
    assert asked is not None
    rules = rules_of(report, asked.set, asked.top, asked.rank or adapter.rank, field)
    source = f"job {asked.job}, set {asked.set}, top {asked.top}"
    changes = {
        "from_analysis": None,
        "rules_from": made_for(report, source).model_dump(),
        "rules": [rule.model_dump() for rule in [*rules, *adapter.rules]],
    }
    return Adapter.model_validate(adapter.model_dump() | changes)


def _texts(experts: list[int]) -> list[str]:
    """The experts as texts that `numbers` reads, each within the length limit."""
    texts = [""]
    for part in ranges(experts):
        joined = f"{texts[-1]},{part}" if texts[-1] else part
        if len(joined) <= NUMBERS_LENGTH:
            texts[-1] = joined
        else:
            texts.append(part)
    return texts
