"""The blocks of expert surgery: which experts of a model go, join or come, and the rows that decide it."""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import NUMBERS_PATTERN, Block, RowFormat, numbers, spans

Action = Literal["prune", "merge", "add", "split"]
Criterion = Literal["reap", "usage"]
Likeness = Literal["outputs", "weights", "router_logits"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
LIKENESSES: tuple[str, ...] = get_args(Likeness)
MOST_ADDED = 1024
REPORT_FILE = "surgery.json"
ALL_LAYERS = "all"
MOST_LAYERS = 1024
_DROP_LENGTH = 4096  # characters: one entry for a layer of hundreds of experts
Experts = Annotated[str, Field(min_length=1, max_length=_DROP_LENGTH)]


class AddedExperts(Block):
    """The experts that action add puts into every layer, and their router rows."""

    count: int = Field(default=1, ge=1, le=MOST_ADDED, description="Number of new experts in each layer.")
    copy_of: int | None = Field(
        default=None,
        ge=0,
        le=65534,
        description="Expert to copy, by its number in each layer; with several new experts the first of as many "
        "neighbours. Left out: with rows, in each layer those that the rows use most; else the first ones.",
    )
    mlp_from: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Model whose MLPs become the new experts, instead of copies: a folder, name of a job, or hub id. "
        "Its layers, widths, activation and biases must be those of this model's experts.",
    )
    mlp_expert: int | None = Field(
        default=None,
        ge=0,
        le=65534,
        description="With `mlp_from`, the first of that model's experts to take; default 0. A dense model has none, "
        "and its MLP becomes each new expert.",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Standard deviation of the noise that is added to each new matrix, as a share of the matrix's own "
        "standard deviation. 0: none, and training all weights does not tell copies apart.",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="Seed of that noise; default 42.")
    router: Literal["copy", "domain", "zero"] = Field(
        default="copy",
        description="Router row of a new expert. copy: that of the expert it copies (with `mlp_from`, the mean of "
        "all); domain: the mean router input of `data`, less that of `data.general_dataset_id`, as long as the other "
        "rows are on average (arXiv 2507.07024); zero: a logit of 0.",
    )
    closed: bool = Field(
        default=False,
        description="Give new experts a bias for the choice so low that no token chooses them: the model computes the "
        "same until that bias rises. Only families that choose by sigmoid scores and a bias (DeepSeek-V3, GLM, "
        "MiniMax, LFM2).",
    )

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> Self:
        if self.mlp_from is not None and self.copy_of is not None:
            raise ValueError(f"copy_of: {self.copy_of} has no effect with `mlp_from`; expected one of the two")
        if self.mlp_from is None and self.mlp_expert is not None:
            raise ValueError(f"mlp_expert: {self.mlp_expert} has no effect without `mlp_from`; expected none")
        if self.noise == 0 and self.seed is not None:
            raise ValueError(f"seed: {self.seed} has no effect without `noise`; expected none")
        return self


# Which of the settings belong to an action; the others have no effect there.
_OF_ACTION: dict[Action, tuple[str, ...]] = {
    "prune": ("keep", "by", "drop"), "merge": ("keep", "by", "align"), "add": ("add",), "split": ("factor",),
}  # fmt: skip
_SETTINGS = ("keep", "by", "drop", "align", "add", "factor")


class Surgery(Block):
    """What to do with a model's experts: every layer gets the same number, as a config states one number for all."""

    action: Action = Field(
        description="What to do. prune: remove experts; merge: average experts that are alike; add: put new experts "
        "beside the old ones; split: replace each expert by several equal ones, which LoRA can train apart, and send a "
        "token to as many times more, so that the model computes the same."
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="With action prune, number of experts to keep in each layer, those with the highest score by `by`; "
        "needs rows; give this or `drop`. With action merge, number of experts that each layer has afterwards.",
    )
    by: Criterion | Likeness | None = Field(
        default=None,
        description="With action prune and `keep`, score of an expert. reap (default): mean of router weight times the "
        "norm of the expert's output, over the tokens that chose it (arXiv 2510.13999); usage: number of tokens that "
        "chose it. With action merge, likeness of experts. outputs (default): their mean outputs on the rows, in "
        "hierarchical clusters (HC-SMoE, arXiv 2410.08589); weights: the same clusters by their weights, which needs "
        "no rows; router_logits: the most used experts, each with those that the router treats alike (M-SMoE, "
        "arXiv 2310.01334).",
    )
    drop: dict[str, Experts] = Field(
        default_factory=dict,
        max_length=MOST_LAYERS,
        description='With action prune, experts to remove, by layer, or in `all` layers: `{"all": "0-3,7"}`. Give this '
        "or `keep`.",
    )
    align: bool | None = Field(
        default=None,
        description="With action merge, permute the hidden neurons of experts to match before they are averaged; left "
        "out: with `by` router_logits, as in its paper.",
    )
    add: AddedExperts | None = Field(
        default=None, description="With action add, the new experts: a block, its fields follow; left out: one copy."
    )
    factor: int | None = Field(
        default=None, ge=2, le=16, description="With action split, number of new experts for each old one; default 2."
    )

    @field_validator("drop")
    @classmethod
    def _names_experts(cls, drop: dict[str, str]) -> dict[str, str]:
        if ALL_LAYERS in drop and len(drop) > 1:
            raise ValueError(f"{ALL_LAYERS!r} is not valid beside layers; expected it alone, or numbers of layers")
        for layer, experts in drop.items():
            if layer != ALL_LAYERS and (not layer.isdecimal() or len(layer) > 4):
                raise ValueError(f"{layer[:128]!r} is not the number of a layer; expected one, or {ALL_LAYERS!r}")
            if not re.fullmatch(NUMBERS_PATTERN, experts):
                raise ValueError(f"{experts[:128]!r} does not name experts; expected numbers and ranges such as 0-3,7")
            for _ in spans(experts):  # checks each range
                pass
        return drop

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> Self:
        for name in _SETTINGS:
            given = getattr(self, name)
            if given not in (None, {}) and name not in _OF_ACTION[self.action]:
                shown = given.model_dump(exclude_unset=True) if isinstance(given, Block) else given
                raise ValueError(f"{name}: {shown!r} has no effect with action {self.action!r}; expected none")
        if self.action == "merge" and self.keep is None:
            raise ValueError("keep: is missing; expected the number of experts that each layer has after a merge")
        known = {"prune": CRITERIA, "merge": LIKENESSES}.get(self.action, ())
        if self.by is not None and self.by not in known:
            raise ValueError(f"by: {self.by!r} is not valid with action {self.action!r}; expected "
                             f"{' or '.join(known)}")  # fmt: skip
        if self.action != "prune":
            return self
        if (self.keep is None) == (not self.drop):
            raise ValueError(f"keep: {self.keep} is not valid {'with' if self.drop else 'without'} `drop`; expected "
                             "one of the two")  # fmt: skip
        if self.by is not None and self.keep is None:
            raise ValueError(f"by: {self.by!r} has no effect with `drop`; expected it with `keep`")
        return self

    @property
    def criterion(self) -> Criterion | None:
        """The score that chooses whom to prune; None where a list does, and with other actions."""
        if self.action != "prune" or self.keep is None:
            return None
        return "usage" if self.by == "usage" else "reap"

    @property
    def likeness(self) -> Likeness:
        """What experts that merge are alike in."""
        if self.by == "weights" or self.by == "router_logits":
            return self.by
        return "outputs"

    @property
    def aligned(self) -> bool:
        """Whether a merge permutes hidden neurons."""
        return self.likeness == "router_logits" if self.align is None else self.align

    @property
    def added(self) -> AddedExperts:
        """The new experts of action add."""
        return self.add or AddedExperts()

    @property
    def why_rows(self) -> str | None:
        """Why this can't be done without rows; None: it can."""
        if self.criterion is not None:
            return "surgery.keep chooses by what experts do on them; or surgery.drop"
        if self.action == "merge" and self.likeness != "weights":
            return f"surgery.by {self.likeness!r} is measured on them; or surgery.by 'weights'"
        if self.action == "add" and self.added.router == "domain":
            return "surgery.add.router 'domain' is their mean router input"
        return None

    def dropped(self) -> dict[str, list[int]]:
        """Layer, or `all` -> the experts to remove, in ascending order."""
        return {layer: sorted(set(numbers(experts))) for layer, experts in self.drop.items()}


class CalibrationData(Block):
    """Rows that show what experts are for."""

    dataset_id: str = Field(
        min_length=1,
        max_length=512,
        description="Data set with the rows; every token of them counts. Its texts decide which experts stay, so they "
        "should be like those that the model is for, refusals included.",
    )
    format: RowFormat = Field(
        default="auto", description="Format of the rows, as in other jobs. Rows without an answer are valid too."
    )
    general_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="With action add, data set with rows of what the model already does, in the same `format`: router "
        "`domain` takes their mean away, and the loss on them is measured too.",
    )


class SurgeryTraining(Block):
    """Settings of the forward passes over the rows; nothing is trained."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="Number of rows in one pass.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Data type of the model's parameters in those passes; the files keep theirs."
    )


class SurgeryOptions(Block):
    """The options of a job that surgery uses."""

    max_length: int = Field(
        default=1024, ge=8, le=1 << 20, description="Maximum number of tokens of a row; the first ones are used."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; default: the model's own."
    )
