"""The blocks of a routing analysis, the report that it leaves, and what plan `per_expert` makes of that.

The report's form is known here, on the ground, for the server and the command line read it, and neither has torch.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.adapter import Adapter, ExpertRule, RulesFrom
from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, Block, DType, RowFormat, ranges

TokenChoice = Literal["prompt", "response", "all"]
SET_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
MOST_SETS = 16
REPORT_FILE = "routing.json"


class AnalysisData(Block):
    """Which rows are compared."""

    sets: dict[str, str] = Field(
        description='Name of a set -> data set registered with the host, two or more: `{"a": "my-prompts", "b": ...}`.'
    )
    format: RowFormat = Field(
        default="auto",
        description="As in other jobs; without an answer rows are taken too (`prompt` alone, or messages that end "
        "with the user's), unless `analysis.tokens` is response.",
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
                raise ValueError(f"{name}: the id of a data set has 1 to 512 characters")
        return sets


class AnalysisTraining(Block):
    """How the passes are made; nothing is trained."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="Rows in one pass.")
    dtype: DType = Field(default="bf16", description="Parameters of the model.")


class AnalysisOptions(Block):
    """Of all the options of a job, those that an analysis reads."""

    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of the resampling.")
    max_length: int = Field(default=1024, ge=8, le=1 << 20, description="Tokens of a row kept, from its start.")
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Use this named chat template; left out: the model's own."
    )


class Analysis(Block):
    """What is counted, and how sure it is."""

    tokens: TokenChoice = Field(
        default="all", description="Tokens that count: the prompt's, the answers', or both; padding never."
    )
    top: int = Field(default=20, ge=1, le=10000, description="Experts that are listed for each set.")
    confidence: float = Field(default=0.95, ge=0.5, lt=1, description="Of the intervals, each for itself.")
    resamples: int = Field(
        default=1000, ge=100, le=10000, description="Bootstrap samples of each set's rows (percentile intervals)."
    )
    permutations: int = Field(
        default=200, ge=20, le=10000, description="Shufflings of rows among sets, for what chance alone would show."
    )


class SetSummary(Block):
    """One data set as it was counted."""

    source: str = Field(description="Data set, or file.")
    rows: int
    tokens: int = Field(description="Those that count.")


class LayerReport(Block):
    """One layer; lists run over its experts, dicts over the sets."""

    layer: int
    rate: dict[str, list[float]] = Field(description="Share of a set's tokens that were routed to the expert.")
    difference: dict[str, list[float]] = Field(description="Rate less the mean rate of the other sets.")
    low: dict[str, list[float]] = Field(description="Lower end of the difference's interval.")
    high: dict[str, list[float]] = Field(description="Upper end.")
    chance_difference: dict[str, list[float]] = Field(
        description="What the difference must exceed: with rows shuffled among sets, no expert of any layer does, at "
        "`confidence`."
    )
    mutual_information: float = Field(
        description="Of set and expert in nats, sets of equal weight: 0 where they are routed alike, at most ln(sets)."
    )
    chance_mean: float = Field(description="The same with rows shuffled among sets, mean: the estimate's bias.")
    chance_high: float = Field(description="The same, quantile at `confidence`.")


class RankedExpert(Block):
    """One of a set's experts, by difference."""

    layer: int
    expert: int
    rate: float
    difference: float
    low: float
    high: float
    is_sure: bool = Field(description="The interval lies above 0, and the difference above what chance shows.")


class RoutingReport(Block):
    """What a routing analysis found."""

    kind: Literal["routing_analysis"] = "routing_analysis"
    version: Literal[1] = 1
    model: str
    adapter: str | None
    family: str
    moe_layers: list[int] = Field(min_length=1)
    num_experts: int = Field(ge=1)
    top_k: int
    tokens: TokenChoice
    confidence: float
    resamples: int
    permutations: int
    seed: int
    sets: dict[str, SetSummary]
    layers: list[LayerReport]
    top: dict[str, list[RankedExpert]] = Field(description="Of each set, experts that it uses more than the others.")

    @model_validator(mode="after")
    def _of_one_piece(self) -> "RoutingReport":
        if [layer.layer for layer in self.layers] != self.moe_layers:
            raise ValueError("layers are not those of moe_layers")
        for layer in self.layers:
            for by_set in (layer.rate, layer.difference, layer.low, layer.high, layer.chance_difference):
                if set(by_set) != set(self.sets) or any(len(row) != self.num_experts for row in by_set.values()):
                    raise ValueError(f"layer {layer.layer} has not {self.num_experts} experts for each set")
        return self

    def ranked(self, name: str) -> list[RankedExpert]:
        """Every expert of every layer, by how much more set `name` uses it than the others do."""
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
    """A routing.json of this machine, for the command line.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return RoutingReport.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(field, str(path), f"a routing analysis ({type(error).__name__})") from None


def rules_of(report: RoutingReport, name: str, top: int, rank: int, field: str) -> list[ExpertRule]:
    """A rule a layer for the `top` experts that set `name` uses more than the others do, beyond doubt.

    Args:
        report: an analysis.
        name: of one of its sets.
        top: at most so many, of those that are sure.
        rank: of their LoRA.
        field: the caller's name of the block that asks, for errors.

    Raises:
        InvalidInput: no such set, or no expert of which it is sure.
    """
    chosen = chosen_experts(report, name, top, field)
    return [
        ExpertRule(layers=str(layer), experts=dict.fromkeys(_texts(experts), rank)) for layer, experts in chosen.items()
    ]


def masks_of(report: RoutingReport, name: str, top: int, field: str) -> dict[str, str]:
    """The same experts as `eval.masked_experts` names them: layer -> `0-3,7`.

    Raises:
        InvalidInput: see `rules_of`.
    """
    chosen = chosen_experts(report, name, top, field)
    return {str(layer): ",".join(ranges(experts)) for layer, experts in chosen.items()}


def chosen_experts(report: RoutingReport, name: str, top: int, field: str) -> dict[int, list[int]]:
    """Layer -> experts, both ascending; see `rules_of`."""
    if name not in report.sets:
        raise InvalidInput(f"{field}.set", name, f"a set of the analysis: {', '.join(map(repr, report.sets))}")
    # Of thousands of experts hundreds have intervals above 0 by luck alone, and these are at the top of the ranking.
    chosen = [one for one in report.ranked(name) if one.is_sure][:top]
    if not chosen:
        raise InvalidInput(
            f"{field}.set", name, "a set with experts that it surely uses more than the others do; of this one's none "
            "has a difference beyond what chance shows, and an interval above 0"
        )  # fmt: skip
    return {
        layer: sorted(one.expert for one in chosen if one.layer == layer)
        for layer in sorted({one.layer for one in chosen})
    }


def made_for(report: RoutingReport, analysis: str) -> RulesFrom:
    """What goes with the rules: their source, and the model that they are meant for."""
    return RulesFrom(analysis=analysis, moe_layers=report.moe_layers, num_experts=report.num_experts)


def resolve_adapter(adapter: Adapter, report: RoutingReport, field: str) -> Adapter:
    """`adapter` with the experts of its `from_analysis` as rules, before its own, which therefore count.

    Raises:
        InvalidInput: see `rules_of`; or rules of its own for other models' experts.
    """
    asked = adapter.from_analysis
    assert asked is not None
    rules = rules_of(report, asked.set, asked.top, asked.rank or adapter.rank, field)
    told = f"job {asked.job}, set {asked.set}, top {asked.top}"
    changes = {
        "from_analysis": None,
        "rules_from": made_for(report, told).model_dump(),
        "rules": [rule.model_dump() for rule in [*rules, *adapter.rules]],
    }
    return Adapter.model_validate(adapter.model_dump() | changes)


def _texts(experts: list[int]) -> list[str]:
    """`numbers` texts, each as long as one may be."""
    texts = [""]
    for part in ranges(experts):
        joined = f"{texts[-1]},{part}" if texts[-1] else part
        if len(joined) <= NUMBERS_LENGTH:
            texts[-1] = joined
        else:
            texts.append(part)
    return texts
