"""The `adapter` block: what of a model gets LoRA, of which rank, and how fast it learns."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, NUMBERS_LENGTH, NUMBERS_PATTERN, Block, numbers

AdapterPlan = Literal["trunk", "all_experts", "per_expert"]
AdapterGroup = Literal["attention", "experts", "shared_experts", "dense_mlp", "router", "output_head"]
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj"]
ExpertModule = Literal["gate_up_proj", "down_proj"]
MAX_RANK = 1024
MAX_ALPHA = 65536


class ExpertRule(Block):
    """Which experts of which layers get LoRA of which rank, in plan `per_expert`."""

    layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Layers, as `0-3,12`; left out: every MoE layer.",
    )
    experts: dict[str, int] = Field(
        min_length=1, description='Expert, or experts as `0-3,7`, -> rank: `{"0": 16, "4-7": 8}`.'
    )
    lr_multiplier: float = Field(
        default=1.0, gt=0, le=1000, description="Of the learning rate of these experts' LoRA, beside their group's."
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: str | None) -> str | None:
        return _checked(layers)

    @field_validator("experts")
    @classmethod
    def _numbers_and_ranks(cls, experts: dict[str, int]) -> dict[str, int]:
        seen: set[int] = set()
        for key, rank in experts.items():
            if len(key) > NUMBERS_LENGTH or not re.fullmatch(NUMBERS_PATTERN, key):
                raise ValueError(f"{key!r} is not valid; expected experts as '0', '0-3' or '0-3,7'")
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"rank {rank} of experts {key!r} is not valid; expected 1 to {MAX_RANK}")
            if twice := seen & set(numbers(key)):
                raise ValueError(f"expert {min(twice)} is named twice")
            seen |= set(numbers(key))
        return experts


class ExpertsOfAnalysis(Block):
    """The experts that a routing analysis found."""

    job: str = Field(
        pattern=JOB_ID_PATTERN,
        description="A completed routing_analysis job of the same owner. (`moe-train submit` takes `file`, the path of "
        "a routing.json, in its place, and sends what it found.)",
    )
    set: str = Field(
        min_length=1, max_length=32, description="Experts that this data set uses more than the others do."
    )
    top: int = Field(
        ge=1,
        le=65536,
        description="At most so many, over all layers, of the greatest difference; none that chance explains "
        "(`is_sure` in the report).",
    )


class FromAnalysis(ExpertsOfAnalysis):
    """The experts that a routing analysis found; they become `rules` when the job is taken, before its own ones."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK, description="Of their LoRA; left out: `adapter.rank`.")


class RulesFrom(Block):
    """Where rules, or masks, come from, and the model that they are meant for; any other is refused."""

    analysis: str = Field(min_length=1, max_length=512, description="Which one, for a person.")
    moe_layers: list[int] = Field(description="Layers with experts that the model must have.")
    num_experts: int = Field(ge=1, le=65536, description="Experts that each of them must have.")


def _checked(layers: str | None) -> str | None:
    if layers is not None:
        list(numbers(layers))
    return layers


class Adapter(Block):
    """LoRA (Hu et al. 2021, arXiv 2106.09685). A job without this block trains all weights."""

    plan: AdapterPlan | None = Field(
        default=None,
        description="trunk: all but the experts; all_experts: trunk and every expert, one rank; per_expert: trunk and "
        "the experts of `rules`. Left out: all_experts where `apply_lora_to_mlp`, else attention alone.",
    )
    rules: list[ExpertRule] = Field(
        default=[], max_length=100, description="per_expert: which experts; of two that name one, the later counts."
    )
    from_analysis: FromAnalysis | None = Field(
        default=None, description="per_expert: experts that a routing analysis found, beneath those of `rules`."
    )
    rules_from: RulesFrom | None = Field(
        default=None, description="Made of `from_analysis`: its source, and the model it was of."
    )
    rank: int = Field(default=16, ge=1, le=MAX_RANK, description="Rank r of every update that has none of its own.")
    router_rank: int | None = Field(
        default=None, ge=1, le=MAX_RANK, description="Rank of the routers' LoRA (`moe.train_router`)."
    )
    alpha: float = Field(default=32, gt=0, le=MAX_ALPHA, description="Updates are scaled by alpha / rank.")
    alphas: dict[AdapterGroup, float] = Field(
        default={}, description="Group -> an alpha of its own. Unequal experts are all scaled by their largest rank."
    )
    lr_multipliers: dict[AdapterGroup, float] = Field(
        default={}, description="Group -> what its learning rate is multiplied by."
    )
    lora_attn_modules: list[AttentionModule] = Field(
        default=["q_proj", "k_proj", "v_proj", "output_proj"],
        description="Attention projections that get LoRA; `output_proj` is the projection back (o_proj).",
    )
    apply_lora_to_mlp: bool = Field(
        default=True,
        description="LoRA on the MLP: every expert's own (distinct), shared experts and dense layers.",
    )
    expert_modules: list[ExpertModule] = Field(
        default=["gate_up_proj", "down_proj"], min_length=1, description="Projections of the experts that get LoRA."
    )
    apply_lora_to_output: bool = Field(default=False, description="LoRA on the output head (lm_head).")
    layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Layers that get LoRA, as `0-3,12`; left out: all.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on LoRA's input; on routers, which PEFT adapts, there is none."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        default=False, description="DoRA (arXiv 2402.09353); on attention only, refused where parameters are targets."
    )
    quantize_base: bool = Field(
        default=False, description="Hold the frozen experts and linear layers quantised (QLoRA, arXiv 2305.14314)."
    )
    quantize_bits: Literal[4, 8] = Field(
        default=4, description="Of `quantize_base`: 4 (NF4) or 8 (dynamic), in blocks with a scale each."
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: str | None) -> str | None:
        return _checked(layers)

    @field_validator("lora_attn_modules", "expert_modules")
    @classmethod
    def _no_duplicates(cls, modules: list[str]) -> list[str]:
        if len(set(modules)) != len(modules):
            raise ValueError(f"{modules} names a module twice")
        return modules

    @field_validator("alphas", "lr_multipliers")
    @classmethod
    def _positive(cls, by_group: dict[str, float]) -> dict[str, float]:
        for group, value in by_group.items():
            if not 0 < value <= MAX_ALPHA:
                raise ValueError(f"{group}: {value:g} is not valid; expected > 0, <= {MAX_ALPHA}")
        return by_group

    @model_validator(mode="after")
    def _targets_something(self) -> "Adapter":
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            raise ValueError("an adapter without a target trains nothing; name lora_attn_modules, or set "
                             "apply_lora_to_mlp or apply_lora_to_output")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _plan_and_its_settings_agree(self) -> "Adapter":
        if self.plan in ("all_experts", "per_expert") and not self.apply_lora_to_mlp:
            raise ValueError(f"plan: {self.plan!r} adapts experts; apply_lora_to_mlp must be true with it")
        if self.plan == "per_expert" and not (self.rules or self.from_analysis):
            raise ValueError("rules: plan 'per_expert' needs at least one, as {\"layers\": \"0-3\", "
                             "\"experts\": {\"0\": 16}}, or from_analysis")  # fmt: skip
        for name in ("rules", "from_analysis", "rules_from"):
            if getattr(self, name) and self.plan != "per_expert":
                verb = "are" if name == "rules" else "is"
                raise ValueError(f"{name}: {verb} read by plan 'per_expert' only, and this is {self.plan!r}")
        if self.quantize_bits != 4 and not self.quantize_base:
            raise ValueError("quantize_bits: is read only with quantize_base true")
        if self.quantize_base and self.use_dora:
            raise ValueError("use_dora: true needs weights that can be read; not valid with quantize_base true")
        return self
