"""The blocks of directional ablation: what is measured, and the plan of what is edited.

`compute.methods.ablation` has the formulas.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llama_stack_provider_moe.spec.adapter import ExpertsOfAnalysis, RulesFrom
from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, NUMBERS_PATTERN, Block, ExpertsByLayer, numbers
from llama_stack_provider_moe.spec.routing import AnalysisData, AnalysisTraining, RoutingReport, made_for, masks_of

DirectionKind = Literal["plain", "projected", "biprojected"]
NormPreserving = Literal["column", "row", "off"]
MEASUREMENTS_FILE = "measurements.safetensors"
TARGET, BASELINE = "target", "baseline"
MOST_ENTRIES = 1024
# What may name the routed experts that a plan edits.
_CHOICES = ("expert_subset", "layer_experts", "from_analysis")
_NONE = frozenset[int]()
AblationOutput = Literal["model", "lora"]
OFF_FOR_LORA = "off with output lora, because an edit that keeps norms is no update of low rank"


class ContrastData(AnalysisData):
    """The two sets whose mean hidden states are compared."""

    @field_validator("sets")
    @classmethod
    def _are_the_two(cls, sets: dict[str, str]) -> dict[str, str]:
        if set(sets) != {TARGET, BASELINE}:
            raise ValueError(f"{', '.join(sets)} can't be compared; expected two sets, {TARGET} (prompts that show the "
                             f"concept) and {BASELINE} (other prompts)")  # fmt: skip
        return sets


class Measure(Block):
    """Which hidden states to average."""

    position: int = Field(
        default=-1,
        ge=-4096,
        le=4095,
        description="Token of each prompt whose hidden states are averaged: -1 the last one (of the template's "
        "generation prompt), -2 the one before; 0 the first.",
    )
    span: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Number of tokens of each prompt whose hidden states are averaged, the last of them at `position`.",
    )


class MeasureTraining(AnalysisTraining):
    """Settings of the forward passes; nothing is trained."""

    quantize_bits: Literal[4, 8] | None = Field(
        default=None, description="Quantise the model to so many bits while it is measured; left out: not quantised."
    )
    quantize_scales: bool = Field(
        default=False, description="Quantise the scales of 4 bits too, as `adapter.quantize_scales` does in training."
    )

    @model_validator(mode="after")
    def _scales_are_of_four_bits(self) -> "MeasureTraining":
        if self.quantize_scales and self.quantize_bits != 4:
            raise ValueError("quantize_scales: true is used only with quantize_bits 4")
        return self


def _as_text(layer: object) -> object:
    """`30` may stand for `"30"`: YAML and JSON write a single layer as a number."""
    return str(layer) if isinstance(layer, int) and not isinstance(layer, bool) else layer


class AblatedLayers(Block):
    """Decoder blocks to edit, and the direction to remove from them."""

    layer: Annotated[str, BeforeValidator(_as_text)] = Field(
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Decoder blocks to edit, counted from 0: a number, or ranges such as `10-20,25`.",
    )
    measurement: int = Field(
        ge=0, le=9999, description="Decoder block after which the direction was measured, counted from 0."
    )
    scale: float = Field(default=1.0, gt=0, le=2, description="Share of the direction that is removed; 1 is all of it.")
    sparsity: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the residual stream's dimensions that is left untouched: those where the direction has "
        "its smallest numbers.",
    )

    @field_validator("layer")
    @classmethod
    def _are_ranges(cls, layer: str) -> str:
        list(numbers(layer))
        return layer


class StreamEdit(Block):
    """Which directions go from which decoder blocks: from their weights, or from what they compute at run time."""

    ablate_individual_experts: bool = Field(
        default=False, description="Edit the routed experts' down projections too, not only shared and dense ones."
    )
    direction: DirectionKind = Field(
        default="projected",
        description="Direction to remove: plain is the difference of the sets' means; projected is its part orthogonal "
        "to the baseline's mean; biprojected also to the baseline's mean at the edited layer.",
    )
    gate_scale: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of an entry's `scale` at which the router stops reading the direction; 0 leaves routers "
        "untouched.",
    )
    interpolate: bool = Field(
        default=False,
        description="Edit the blocks between the entries of `ablate` too, which then name one block each: scale, "
        "sparsity and measurement go linearly from one entry to the next.",
    )
    ablate: list[AblatedLayers] = Field(
        min_length=1, max_length=MOST_ENTRIES, description="Decoder blocks to edit; no block may be in two entries."
    )

    @model_validator(mode="after")
    def _interpolates_between_blocks(self) -> Self:
        if self.interpolate and (len(self.ablate) < 2 or any(not each.layer.isdigit() for each in self.ablate)):
            raise ValueError("interpolate: true is not valid with these entries; expected two or more in `ablate`, "
                             "each of one block")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _each_block_is_named_once(self) -> Self:
        seen: dict[int, int] = {}
        for at, entry in enumerate(self.ablate):
            for layer in numbers(entry.layer):
                if layer in seen:
                    raise ValueError(f"ablate.{at}.layer: {entry.layer!r} names block {layer}, as entry {seen[layer]} "
                                     "does; expected each block once")  # fmt: skip
                seen[layer] = at
        return self

    def edits(self) -> dict[int, AblatedLayers]:
        """Each edited block, in ascending order -> its entry, which names this block alone."""
        named = {layer: entry for entry in self.ablate for layer in numbers(entry.layer)}
        if self.interpolate:
            named |= _between(sorted(self.ablate, key=lambda entry: int(entry.layer)))
        return {layer: named[layer].model_copy(update={"layer": str(layer)}) for layer in sorted(named)}


class RunTimeAblation(StreamEdit):
    """Directions to take out of what a model computes; its weights stay. Norms are not kept, as if they were `off`."""

    measurements: str = Field(
        min_length=1,
        max_length=1024,
        description="Measurements of the model: one of your jobs of recipe `ablation_measure`.",
    )


class AblationPlan(StreamEdit):
    """What an ablation edits; `ablate` says where."""

    expert_subset: list[Annotated[int, Field(ge=0, le=65535)]] | None = Field(
        default=None,
        min_length=1,
        max_length=65536,
        description="Numbers of the routed experts to edit in each layer; left out: all of them.",
    )
    layer_experts: ExpertsByLayer | None = Field(
        default=None,
        min_length=1,
        description='Routed experts to edit, by layer: `{"3": "0-3,7"}`; in other layers none is edited. Left out: '
        "`expert_subset`.",
    )
    from_analysis: ExpertsOfAnalysis | None = Field(
        default=None,
        description="Experts that a routing analysis found; the server turns them into `layer_experts`. Left out: "
        "none.",
    )
    layer_experts_from: RulesFrom | None = Field(
        default=None,
        description="Source of the `layer_experts` that `from_analysis` became, and the model that they fit; the "
        "server fills it in.",
    )
    norm_preserving: NormPreserving = Field(
        default="column",
        description="Norms to keep in an edited matrix: those of its columns, which removes the direction exactly; of "
        "its rows, which brings some of it back; or off.",
    )

    @model_validator(mode="after")
    def _no_subset_is_without_effect(self) -> Self:
        given = [name for name in _CHOICES if getattr(self, name) is not None]
        if given and not self.ablate_individual_experts:
            raise ValueError(f"{given[0]}: has no effect without ablate_individual_experts true")
        if len(given) > 1:
            raise ValueError(f"{given[0]}: is not valid beside {given[1]}; expected one of {', '.join(_CHOICES)}")
        if self.layer_experts_from is not None and self.layer_experts is None:
            raise ValueError("layer_experts_from: has no effect without layer_experts")
        if self.expert_subset is not None and len(set(self.expert_subset)) < len(self.expert_subset):
            raise ValueError(f"expert_subset: {self.expert_subset} names an expert twice; expected each once")
        return self

    def by_layer(self) -> dict[int, frozenset[int]]:
        """`layer_experts` with numbers."""
        return {int(layer): frozenset(numbers(experts)) for layer, experts in (self.layer_experts or {}).items()}

    def experts_of(self, layer: int) -> frozenset[int] | None:
        """The routed experts that are edited in a layer; None: all of them."""
        if self.layer_experts is not None:
            return self.by_layer().get(layer, _NONE)
        return None if self.expert_subset is None else frozenset(self.expert_subset)


def resolve_experts[Plan: AblationPlan](plan: Plan, report: RoutingReport, field: str) -> Plan:
    """`plan` with the experts that its `from_analysis` selects as `layer_experts`.

    Args:
        plan: a plan with a `from_analysis`.
        report: that analysis.
        field: the caller's name of the setting, for errors.

    Raises:
        InvalidInput: no such set, or no expert that the analysis is sure of.
        ValidationError: the experts of a layer are too long a text.
    """
    asked = plan.from_analysis
    assert asked is not None
    changes = {
        "from_analysis": None,
        "layer_experts": masks_of(report, asked.set, asked.top, field),
        "layer_experts_from": made_for(report, f"job {asked.job}, set {asked.set}, top {asked.top}").model_dump(),
    }
    return plan.model_validate(plan.model_dump() | changes)


def _between(entries: list[AblatedLayers]) -> dict[int, AblatedLayers]:
    found: dict[int, AblatedLayers] = {}
    for one, other in pairwise(entries):
        first, last = int(one.layer), int(other.layer)
        for layer in range(first + 1, last):
            share = (layer - first) / (last - first)
            found[layer] = AblatedLayers(
                layer=str(layer),
                measurement=round(one.measurement + share * (other.measurement - one.measurement)),
                scale=one.scale + share * (other.scale - one.scale),
                sparsity=one.sparsity + share * (other.sparsity - one.sparsity),
            )
    return found
