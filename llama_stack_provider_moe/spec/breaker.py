"""The `circuit_breaker` block: which representations of a model are rerouted, which are retained, and how strongly.

Circuit breakers are from Zou et al. 2024 (arXiv 2406.04313), RepBend is from Yousefpour et al. 2025 (arXiv 2504.01550).
Layers are decoder blocks, counted from 0. The official code counts in transformers' `hidden_states`, whose entry i is
the output of block i - 1 (entry 0 is the embeddings): its layer 10 is block 9 here.
"""

from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import MAX_STEPS, NUMBERS_LENGTH, NUMBERS_PATTERN, Block, RowFormat, numbers

CurveShape = Literal["linear", "cosine"]
PresetName = Literal[
    "llama-3-8b", "mistral-7b", "llama-4-scout", "mixtral-8x7b", "qwen3-30b-a3b", "granite-moe", "glm-4.5-air"
]  # fmt: skip
DEFAULT_ALPHA = 10.0


class Preset(NamedTuple):
    """The values for a model family where the job leaves them out.

    Attributes:
        model_type, layers, hidden_size: of the models that it applies to, by their config; None: any.
        targets: decoder blocks whose outputs are rerouted, from 0; None: by `depth_rule`.
        last_lora: last decoder block that gets LoRA, from 0; None: the last target.
        alpha: weight of both losses.
        source: where the values come from.
    """

    model_type: str
    layers: int | None
    hidden_size: int | None
    targets: tuple[int, ...] | None
    last_lora: int | None
    alpha: float
    source: str


_RULE = "our rule: the blocks at one third and two thirds of the depth, LoRA up to the last of them"
_OFFICIAL = "arXiv 2406.04313 and its code: hidden_states 10 and 20 (blocks 9 and 19), LoRA on blocks 0 to 20"
PRESETS: dict[PresetName, Preset] = {
    "llama-3-8b": Preset("llama", 32, 4096, (9, 19), 20, 10.0, f"{_OFFICIAL}, alpha 10"),
    "mistral-7b": Preset("mistral", 32, 4096, (9, 19), 20, 5.0, f"{_OFFICIAL}, alpha 5"),
    "llama-4-scout": Preset(
        "llama4_text", 48, 5120, (12, 24, 36), 29, 10.0,
        "this project's own first plan: blocks 12, 24 and 36, LoRA on blocks 0 to 29; alpha as for Llama-3-8B",
    ),
    "mixtral-8x7b": Preset(
        "mixtral", 32, 4096, (9, 19), 20, 5.0,
        "our rule: as for Mistral-7B, which has the same depth, width and attention",
    ),
    "qwen3-30b-a3b": Preset("qwen3_moe", 48, 2048, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
    "granite-moe": Preset("granitemoe", None, None, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
    "glm-4.5-air": Preset("glm4_moe", 46, 4096, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
}  # fmt: skip
ANY_MODEL = Preset("", None, None, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B")


def depth_rule(layers: int) -> tuple[int, ...]:
    """The blocks, from 0, at one third and two thirds of the depth: of 32 blocks 9 and 20."""
    return tuple(sorted({max(0, layers // 3 - 1), max(0, 2 * layers // 3 - 1)}))


def preset_for(model_type: str, layers: int, hidden_size: int) -> tuple[PresetName | None, Preset]:
    """The preset of a model, by its text config; without a name if no preset is made for the model."""
    for name, preset in PRESETS.items():
        sizes = ((preset.layers, layers), (preset.hidden_size, hidden_size))
        if preset.model_type == model_type and all(wanted in (None, found) for wanted, found in sizes):
            return name, preset
    return None, ANY_MODEL


class MixedData(Block):
    """A data set used beside `data`."""

    dataset_id: str = Field(
        min_length=1, max_length=512, description="Data set with the rows: one that you uploaded, or the host's."
    )
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Id of its held-out data set; left out: `options.validation_split` of its rows are held out.",
    )
    format: RowFormat = Field(default="auto", description="Form of these rows, as `data.format`.")
    ratio: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Rows of this set for each row of `data`; an epoch is one pass over `data`.",
    )


class Curve(Block):
    """A coefficient over the length of the schedule; it stays at `end` afterwards."""

    start: float = Field(ge=0, le=10000, description="Coefficient before the first step.")
    end: float = Field(ge=0, le=10000, description="Coefficient at the schedule's end and after it.")
    schedule: CurveShape = Field(default="linear", description="Shape of the curve from `start` to `end`.")


class RepBend(Block):
    """Weights of RepBend's terms; the retain distance has weight 1/2. The defaults are ours."""

    push: float = Field(
        default=0.5,
        ge=0,
        le=10000,
        description="Weight alpha of the distance from the base model on break rows, which training increases.",
    )
    gather: float = Field(
        default=0.1,
        ge=0,
        le=10000,
        description="Weight beta of the mean cosine between two break rows, over the pairs inside the micro-batches "
        "of a step.",
    )
    kl: float = Field(
        default=0.3,
        ge=0,
        le=10000,
        description="Weight gamma of KL(base || model) per token of retain rows; above 0, all blocks and the head "
        "run. 0: not computed.",
    )


class CircuitBreaker(Block):
    """Reroute the representations of the rows of `data`, and keep those of `retain` as they are."""

    retain: MixedData = Field(description="Rows whose representations stay as they are, such as benign conversations.")
    safe: MixedData | None = Field(
        default=None,
        description="Safe rows that look unsafe, to prevent over-refusal; retained like `retain`. Left out: none.",
    )
    preset: PresetName | None = Field(
        default=None,
        description="Model family whose layers and alpha to use; left out: the preset of the model, or the general "
        "rule if it has none.",
    )
    target_layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Decoder blocks, from 0, whose outputs are rerouted, e.g. `9,19`; left out: those of the preset.",
    )
    variant: Literal["rr", "repbend"] = Field(
        default="rr",
        description="Method: rr: representation rerouting (arXiv 2406.04313); repbend: RepBend (arXiv 2504.01550).",
    )
    weighting: Literal["paper", "dual"] = Field(
        default="paper",
        description="Coefficients of rr. paper: alpha (1 - p) for rerouting and alpha p for retaining, where p rises "
        "from 0 to 1/2 over the schedule (and on to 1 after it); dual: `reroute_curve` and "
        "`retain_curve`.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=10000,
        description="Weight of both losses with weighting paper; left out: that of the preset.",
    )
    schedule: CurveShape = Field(default="linear", description="Shape of the rise of p with weighting paper.")
    schedule_steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Length T of the schedule in optimiser steps; left out: all steps of the job.",
    )
    reroute_curve: Curve | None = Field(
        default=None, description="Coefficient of rerouting; needed by weighting dual, and used only there."
    )
    retain_curve: Curve | None = Field(
        default=None, description="Coefficient of retaining; needed by weighting dual, and used only there."
    )
    mask: Literal["response", "all"] = Field(
        default="response",
        description="Tokens of break rows that count. response: those of the answer; all: those of the request too.",
    )
    request_length: int = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="Maximum number of tokens of a break row's request; the last ones are kept.",
    )
    response_length: int = Field(
        default=512,
        ge=1,
        le=1 << 20,
        description="Maximum number of tokens of a break row's answer; the first ones are kept.",
    )
    retain_layers: Literal["targets", "all"] = Field(
        default="targets",
        description="Layers at which the retain distance is measured. targets: the target layers, and no block above "
        "them runs; all: all `hidden_states`, as in the official code: the embeddings, every block but "
        "the last, and the final norm.",
    )
    repbend: RepBend = Field(default_factory=RepBend)

    @field_validator("target_layers")
    @classmethod
    def _ascending(cls, layers: str | None) -> str | None:
        if layers is not None:
            list(numbers(layers))
        return layers

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "CircuitBreaker":
        paper = self.variant == "rr" and self.weighting == "paper"
        dual = self.variant == "rr" and self.weighting == "dual"
        given = f"this job has variant {self.variant!r} and weighting {self.weighting!r}"
        if not paper and (self.alpha is not None or self.schedule != "linear"):
            name = "alpha" if self.alpha is not None else "schedule"
            raise ValueError(f"{name}: is used by variant 'rr' with weighting 'paper' only, and {given}")
        for name in ("reroute_curve", "retain_curve"):
            if (getattr(self, name) is not None) is not dual:
                verb = "is needed by" if dual else "is used by"
                raise ValueError(f"{name}: {verb} variant 'rr' with weighting 'dual'{'' if dual else ' only'}, and "
                                 f"{given}")  # fmt: skip
        if self.variant == "repbend" and (self.weighting != "paper" or self.schedule_steps is not None):
            name = "weighting" if self.weighting != "paper" else "schedule_steps"
            raise ValueError(f"{name}: is not valid with variant 'repbend', whose weights are constant: those of "
                             "the block `repbend`")  # fmt: skip
        if self.variant == "rr" and self.repbend != RepBend():
            raise ValueError("repbend: is used by variant 'repbend' only, and this job has variant 'rr'")
        return self

    def parts(self) -> dict[str, MixedData]:
        """The sets that are retained, by the name of their field."""
        return {"retain": self.retain} | ({} if self.safe is None else {"safe": self.safe})
