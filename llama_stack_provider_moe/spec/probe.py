"""The blocks of a job that fits a probe on hidden states, and the job itself."""

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.ablation import BASELINE, TARGET, Measure
from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, NUMBERS_PATTERN, numbers
from llama_stack_provider_moe.spec.inference_jobs import AnalysisJob
from llama_stack_provider_moe.spec.routing import AnalysisData, WholeRowOptions
from llama_stack_provider_moe.spec.row_sources import RowSource

CARD_FILE = "probe.json"
WEIGHTS_FILE = "probe.safetensors"
TEST_TARGET, TEST_BASELINE = "test_target", "test_baseline"
REQUIRED, TESTS = (TARGET, BASELINE), (TEST_TARGET, TEST_BASELINE)
PARTS = 3  # of a set: to fit, to choose and set the threshold, to report
LEAST_TARGETS = 30
LEAST_TESTED = 10
MOST_CANDIDATES = 16

Views = Literal["whole", "latest", "each"]
ReadTokens = Literal["content", "position"]


def least_negatives(rate: float) -> int:
    """The fewest negatives on which a threshold for a false-positive rate can be set: one of them may be above it."""
    return math.ceil(round(1 / rate, 9))


class ProbeData(AnalysisData):
    """The sets that a probe tells apart, and sets of other wording to test it on."""

    @field_validator("sets")
    @classmethod
    def _are_two_or_four(cls, sets: dict[str, str]) -> dict[str, str]:
        if set(sets) not in ({*REQUIRED}, {*REQUIRED, *TESTS}):
            raise ValueError(f"{', '.join(sets)} can't fit a probe; expected {TARGET} (prompts that show the concept) "
                             f"and {BASELINE} (other prompts), and beside them both or neither of {TEST_TARGET} and "
                             f"{TEST_BASELINE} (prompts of other wording, for the report alone)")  # fmt: skip
        return sets


class Probe(Measure):
    """Which hidden states the probe reads, and how it is fitted."""

    tokens: ReadTokens = Field(
        default="content",
        description="Tokens whose states are read, as their mean. content: all tokens of the messages' own text, "
        "without the template's and a system message's; position: the `span` tokens up to `position`.",
    )
    layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Decoder blocks to choose from, counted from 0: numbers and ranges such as `8,12-16`, 16 at most; "
        "left out: six, from a quarter to three quarters of the model.",
    )
    layers_read: int = Field(
        default=1,
        ge=1,
        le=2,
        description="Number of decoder blocks that the probe reads, each with its own weights: the best one, or the "
        "best two, of which the higher probability counts.",
    )
    views: Views = Field(
        default="latest",
        description="What is scored of a conversation, of which the worst counts. whole: all of it; latest: also its "
        "newest message alone; each: also each of its messages alone.",
    )
    false_positive_rate: float = Field(
        default=0.01,
        ge=0.0001,
        le=0.2,
        description="Share of baseline conversations that may be flagged: the threshold is set for it, on a third of "
        "the baseline, which needs at least 1 divided by this many rows.",
    )
    split: Literal["shuffled", "in_order"] = Field(
        default="shuffled",
        description="How a set is divided into thirds that fit, choose and report. shuffled: by a hash of each row; "
        "in_order: as the rows stand, for sets in which rows that resemble each other stand together.",
    )
    l2: float = Field(
        default=0.01,
        gt=0,
        le=1000,
        description="Weight of the squared weights in the loss; with a larger one the probe fits less closely.",
    )

    @field_validator("layers")
    @classmethod
    def _are_few_ranges(cls, layers: str | None) -> str | None:
        named = 0 if layers is None else len(set(numbers(layers)))
        if named > MOST_CANDIDATES:
            raise ValueError(f"{layers!r} names {named} blocks; expected at most {MOST_CANDIDATES}")
        return layers

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> Self:
        for name in ("position", "span"):
            value = getattr(self, name)
            if self.tokens == "content" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {value} has no effect with tokens 'content'; expected tokens 'position'")
        return self


class ProbeSpec(AnalysisJob):
    """Fits a probe that scores conversations at run time; trains none of the model's weights."""

    recipe: Literal["probe"] = Field(
        description="Probe: a logistic regression on hidden states that tells two sets of prompts apart at run time."
    )
    data: ProbeData = Field(description="Prompts to tell apart: a block, its fields follow.")
    options: WholeRowOptions = Field(default_factory=WholeRowOptions)
    probe: Probe = Field(default_factory=Probe)

    def row_sources(self) -> list[RowSource]:
        """The two sets, and those to test with."""
        rate = self.probe.false_positive_rate
        negatives = PARTS * least_negatives(rate)
        least = {
            TARGET: (LEAST_TARGETS, f"at least {LEAST_TARGETS} rows: a third fits the probe, a third chooses its "
                     "layer, a third measures it"),
            BASELINE: (negatives, f"at least {negatives} rows, because a third of them sets the threshold for "
                       f"probe.false_positive_rate {rate:g}"),
        }  # fmt: skip
        tested = (LEAST_TESTED, f"at least {LEAST_TESTED} rows, which measure the probe")
        return [
            RowSource(f"data.sets.{name}", dataset_id, self.data.format, f"set-{name}", *least.get(name, tested), False)
            for name, dataset_id in self.data.sets.items()
        ]
