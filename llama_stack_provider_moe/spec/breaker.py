"""The `circuit_breaker` block: what of a model's representations is rerouted, what is retained, and how strongly.

Circuit breakers are Zou et al. 2024 (arXiv 2406.04313), RepBend Yousefpour et al. 2025 (arXiv 2504.01550). Layers are
decoder blocks, counted from 0. The official code counts in transformers' `hidden_states`, whose entry i is the output
of block i - 1 (entry 0 is the embeddings): its layer 10 is block 9 here.
"""

from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import NUMBERS_LENGTH, NUMBERS_PATTERN, Block, RowFormat, numbers

CurveShape = Literal["linear", "cosine"]
PresetName = Literal[
    "llama-3-8b", "mistral-7b", "llama-4-scout", "mixtral-8x7b", "qwen3-30b-a3b", "granite-moe", "glm-4.5-air"
]  # fmt: skip
DEFAULT_ALPHA = 10.0


class Preset(NamedTuple):
    """What is chosen for a family where a job says nothing; `None` in layers: by the rule of `depth_rule`.

    Attributes:
        model_type, layers, hidden_size: of the models it is for, by their config; None: any.
        targets: decoder blocks whose outputs are rerouted, from 0.
        last_lora: last decoder block that gets LoRA, from 0.
        alpha: weight of both losses.
        source: of the values.
    """

    model_type: str
    layers: int | None
    hidden_size: int | None
    targets: tuple[int, ...] | None
    last_lora: int | None
    alpha: float
    source: str


_RULE = "our rule: blocks after which one third and two thirds of the depth have run, LoRA up to the last of them"
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
        "our rule: as for Mistral-7B, whose depth, width and attention it has",
    ),
    "qwen3-30b-a3b": Preset("qwen3_moe", 48, 2048, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
    "granite-moe": Preset("granitemoe", None, None, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
    "glm-4.5-air": Preset("glm4_moe", 46, 4096, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B"),
}  # fmt: skip
ANY_MODEL = Preset("", None, None, None, None, DEFAULT_ALPHA, f"{_RULE}; alpha as for Llama-3-8B")


def depth_rule(layers: int) -> tuple[int, ...]:
    """The blocks, from 0, after which one third and two thirds of all have run: of 32 blocks 9 and 20."""
    return tuple(sorted({max(0, layers // 3 - 1), max(0, 2 * layers // 3 - 1)}))


def preset_for(model_type: str, layers: int, hidden_size: int) -> tuple[PresetName | None, Preset]:
    """The preset of a model, by its text config; without a name where none is its own."""
    for name, preset in PRESETS.items():
        sizes = ((preset.layers, layers), (preset.hidden_size, hidden_size))
        if preset.model_type == model_type and all(wanted in (None, found) for wanted, found in sizes):
            return name, preset
    return None, ANY_MODEL


class MixedData(Block):
    """A data set beside the one that is broken."""

    dataset_id: str = Field(min_length=1, max_length=512, description="Data set registered with the host.")
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Its held-out data set; left out, `options.validation_split` of its rows are held out.",
    )
    format: RowFormat = Field(default="auto", description="As `data.format`, of these rows.")
    ratio: float = Field(
        default=1.0, gt=0, le=100, description="Rows of it for each row of `data`, which are what an epoch passes over."
    )


class Curve(Block):
    """A coefficient over the schedule's length; at `end` it stays."""

    start: float = Field(ge=0, le=10000, description="Coefficient before the first step.")
    end: float = Field(ge=0, le=10000, description="Coefficient at the schedule's end, and after it.")
    schedule: CurveShape = Field(default="linear", description="How it goes from one to the other.")


class RepBend(Block):
    """Weights of RepBend's terms beside the retain distance, whose weight is 1/2; the defaults are ours."""

    push: float = Field(
        default=0.5, ge=0, le=10000, description="alpha: of the distance from the base on break rows, which grows."
    )
    gather: float = Field(
        default=0.1, ge=0, le=10000, description="beta: of the mean cosine between the break rows of a micro-batch."
    )
    kl: float = Field(
        default=0.3,
        ge=0,
        le=10000,
        description="gamma: of KL(base || model) a token of retain rows; > 0 runs all blocks and the head.",
    )


class CircuitBreaker(Block):
    """Reroute the representations of the rows of `data`, and keep those of `retain` where they are."""

    retain: MixedData = Field(description="Rows whose representations stay; benign conversations.")
    safe: MixedData | None = Field(
        default=None, description="Safe rows that look unsafe, against over-refusal; retained like `retain`."
    )
    preset: PresetName | None = Field(
        default=None, description="Layers and alpha of this family; left out: the model's own, else the rule."
    )
    target_layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Decoder blocks, from 0, whose outputs are rerouted, as `9,19`; left out: by preset.",
    )
    variant: Literal["rr", "repbend"] = Field(
        default="rr", description="rr: representation rerouting (2406.04313); repbend: RepBend (2504.01550)."
    )
    weighting: Literal["paper", "dual"] = Field(
        default="paper",
        description="rr: paper: alpha (1 - p) rerouting, alpha p retaining, p from 0 to 1/2 over the schedule (it goes "
        "on to 1); dual: `reroute_curve` and `retain_curve`.",
    )
    alpha: float | None = Field(
        default=None, gt=0, le=10000, description="paper: weight of both losses; left out: by preset."
    )
    schedule: CurveShape = Field(default="linear", description="paper: how p rises.")
    schedule_steps: int | None = Field(
        default=None, ge=1, description="T, the schedule's length in optimiser steps; left out: all of the job's."
    )
    reroute_curve: Curve | None = Field(default=None, description="dual: coefficient of rerouting.")
    retain_curve: Curve | None = Field(default=None, description="dual: coefficient of retaining.")
    mask: Literal["response", "all"] = Field(
        default="response", description="Tokens of break rows that count: the answer's, or the request's as well."
    )
    request_length: int = Field(
        default=512, ge=1, le=1 << 20, description="Tokens of a break row's request kept, the last ones."
    )
    response_length: int = Field(
        default=512, ge=1, le=1 << 20, description="Tokens of a break row's answer kept, the first ones."
    )
    retain_layers: Literal["targets", "all"] = Field(
        default="targets",
        description="Where the retain distance is taken: at the target layers, beyond which no block then runs, or "
        "at every block, as in the official code.",
    )
    repbend: RepBend = Field(default_factory=RepBend)

    @field_validator("target_layers")
    @classmethod
    def _ascending(cls, layers: str | None) -> str | None:
        if layers is not None:
            list(numbers(layers))
        return layers

    @model_validator(mode="after")
    def _settings_that_would_not_be_read(self) -> "CircuitBreaker":
        paper = self.variant == "rr" and self.weighting == "paper"
        dual = self.variant == "rr" and self.weighting == "dual"
        told = f"variant {self.variant!r} and weighting {self.weighting!r}"
        if not paper and (self.alpha is not None or self.schedule != "linear"):
            name = "alpha" if self.alpha is not None else "schedule"
            raise ValueError(f"{name}: is read by variant 'rr' with weighting 'paper' only, and this is {told}")
        for name in ("reroute_curve", "retain_curve"):
            if (getattr(self, name) is not None) is not dual:
                verb = "is needed by" if dual else "is read by"
                raise ValueError(f"{name}: {verb} variant 'rr' with weighting 'dual'{'' if dual else ' only'}, and "
                                 f"this is {told}")  # fmt: skip
        if self.variant == "repbend" and (self.weighting != "paper" or self.schedule_steps is not None):
            name = "weighting" if self.weighting != "paper" else "schedule_steps"
            raise ValueError(f"{name}: is not valid with variant 'repbend', whose weights are those of `repbend` and "
                             "stay")  # fmt: skip
        if self.variant == "rr" and self.repbend != RepBend():
            raise ValueError("repbend: is read by variant 'repbend' only, and this is 'rr'")
        return self

    def parts(self) -> dict[str, MixedData]:
        """The sets that are retained, by their field's name."""
        return {"retain": self.retain} | ({} if self.safe is None else {"safe": self.safe})
