"""The blocks of directional ablation: what is measured, and the plan of what is edited.

`compute.methods.ablation` has the formulas.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, NUMBERS_PATTERN, Block, numbers
from llama_stack_provider_moe.spec.routing import AnalysisData, AnalysisTraining

DirectionKind = Literal["plain", "projected", "biprojected"]
NormPreserving = Literal["column", "row", "off"]
MEASUREMENTS_FILE = "measurements.safetensors"
TARGET, BASELINE = "target", "baseline"
MOST_ENTRIES = 1024


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


class MeasureTraining(AnalysisTraining):
    """Settings of the forward passes; nothing is trained."""

    quantize_bits: Literal[4, 8] | None = Field(
        default=None, description="Quantise the model to so many bits while it is measured; left out: not quantised."
    )


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
        description="Share of the residual stream's dimensions that is left untouched: those along which the direction "
        "is smallest.",
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
    norm_preserving: NormPreserving = Field(
        default="column",
        description="Norms to keep in an edited matrix: those of its columns, which removes the direction exactly; of "
        "its rows, which brings some of it back; or off.",
    )

    @model_validator(mode="after")
    def _no_subset_is_without_effect(self) -> Self:
        if self.expert_subset is not None and not self.ablate_individual_experts:
            raise ValueError("expert_subset: has no effect without ablate_individual_experts true")
        if self.expert_subset is not None and len(set(self.expert_subset)) < len(self.expert_subset):
            raise ValueError(f"expert_subset: {self.expert_subset} names an expert twice; expected each once")
        return self


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
