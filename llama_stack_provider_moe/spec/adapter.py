"""The `adapter` block: which parts of a model get LoRA, with which rank, and how fast they learn."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import JOB_ID_PATTERN, NUMBERS_LENGTH, NUMBERS_PATTERN, Block, numbers

AdapterPlan = Literal["trunk", "all_experts", "per_expert"]
AdapterGroup = Literal[
    "attention", "experts", "shared_experts", "dense_mlp", "router", "output_head", "projector", "tower"
]
Vision = Literal["off", "projector", "tower"]
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj"]
ExpertModule = Literal["gate_up_proj", "down_proj"]
MAX_RANK = 1024
MAX_ALPHA = 65536
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Factor = Annotated[float, Field(gt=0, le=MAX_ALPHA)]
Layer = Annotated[int, Field(ge=0, le=9999)]


class ExpertRule(Block):
    """Experts of some layers that get LoRA of one or more ranks, in plan `per_expert`."""

    layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Layers that the rule applies to, e.g. `0-3,12`; left out: every MoE layer.",
    )
    experts: dict[str, Rank] = Field(
        min_length=1, description='LoRA rank of each expert or range of experts: `{"0": 16, "4-7": 8}`.'
    )
    lr_multiplier: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Factor on the learning rate of these experts' LoRA, on top of their group's factor.",
    )

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: str | None) -> str | None:
        return _checked(layers)

    @field_validator("experts")
    @classmethod
    def _numbers(cls, experts: dict[str, int]) -> dict[str, int]:
        seen: set[int] = set()
        for key in experts:
            if len(key) > NUMBERS_LENGTH or not re.fullmatch(NUMBERS_PATTERN, key):
                raise ValueError(f"{key!r} is not valid; expected experts such as '0', '0-3' or '0-3,7'")
            if twice := seen & set(numbers(key)):
                raise ValueError(f"expert {min(twice)} is named twice")
            seen |= set(numbers(key))
        return experts


class ExpertsOfAnalysis(Block):
    """The experts that a routing analysis found."""

    job: str = Field(
        pattern=JOB_ID_PATTERN,
        description="Completed routing_analysis job of the same owner, or ablation_measure job of a model with "
        "experts. (`moe-train submit` accepts `file` instead, "
        "the path of a routing.json, and sends the experts that it lists.)",
    )
    set: str = Field(
        min_length=1,
        max_length=32,
        description="Name of a data set in the analysis; the experts that it uses more than the other sets do are "
        "chosen.",
    )
    top: int = Field(
        ge=1,
        le=65536,
        description="Maximum number of experts over all layers, those with the largest difference first; experts that "
        "chance can explain are never chosen (`is_sure` in the report).",
    )


class FromAnalysis(ExpertsOfAnalysis):
    """The experts that a routing analysis found; the server turns them into `rules`, before the job's own rules."""

    rank: int | None = Field(
        default=None, ge=1, le=MAX_RANK, description="Rank of their LoRA; left out: `adapter.rank`."
    )


class RulesFrom(Block):
    """The source of rules or masks, and the model that they were made for; a different model is refused."""

    analysis: str = Field(min_length=1, max_length=512, description="Name of the routing analysis, for a person.")
    moe_layers: list[Layer] = Field(
        max_length=10_000, description="Numbers of the layers with experts that the model must have."
    )
    num_experts: int = Field(ge=1, le=65536, description="Number of experts that each of these layers must have.")


def _checked(layers: str | None) -> str | None:
    if layers is not None:
        list(numbers(layers))
    return layers


class Adapter(Block):
    """LoRA (Hu et al. 2021, arXiv 2106.09685). A job without this block trains all weights."""

    plan: AdapterPlan | None = Field(
        default=None,
        description="Parts that get LoRA. trunk: everything but the experts; all_experts: the trunk and every expert, "
        "with one rank; per_expert: the trunk and the experts of `rules`. Left out: all_experts with "
        "`apply_lora_to_mlp`, else attention only.",
    )
    rules: list[ExpertRule] = Field(
        default=[],
        max_length=100,
        description="Experts to adapt in plan per_expert; where two rules name one expert, the later rule applies.",
    )
    from_analysis: FromAnalysis | None = Field(
        default=None,
        description="Experts to adapt in plan per_expert, as a routing analysis found them; `rules` override them.",
    )
    rules_from: RulesFrom | None = Field(
        default=None,
        description="Source of the rules that `from_analysis` became, and the model that they fit; the server fills "
        "it in.",
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Adapter whose weights this one starts from, on the same `model`: the result of one of your jobs "
        "(`JOB`, `JOB/adapter`, `JOB/epoch-2`), or a folder as for `model`. Ranks, alphas and targets "
        "must be equal; those that you leave out are copied from it. Left out: start from new weights.",
    )
    rank: int = Field(
        default=16, ge=1, le=MAX_RANK, description="Rank r of every update that no other setting gives a rank."
    )
    router_rank: int | None = Field(
        default=None, ge=1, le=MAX_RANK, description="Rank of the routers' LoRA (`moe.train_router`); left out: `rank`."
    )
    alpha: float = Field(
        default=32, gt=0, le=MAX_ALPHA, description="Scale of the updates: each is multiplied by alpha / rank."
    )
    alphas: dict[AdapterGroup, Factor] = Field(
        default={},
        description="Alpha of each group that differs from `alpha`. Experts of unequal ranks are all scaled by the "
        "largest of their ranks.",
    )
    lr_multipliers: dict[AdapterGroup, Factor] = Field(
        default={}, description="Factor on the learning rate of each group; a group that is left out has 1."
    )
    lora_attn_modules: list[AttentionModule] = Field(
        default=["q_proj", "k_proj", "v_proj", "output_proj"],
        description="Attention projections that get LoRA; `output_proj` is the output projection (o_proj).",
    )
    apply_lora_to_mlp: bool = Field(
        default=True,
        description="Use LoRA on the MLP: on every expert separately, on shared experts and on dense layers.",
    )
    expert_modules: list[ExpertModule] = Field(
        default=["gate_up_proj", "down_proj"], min_length=1, description="Projections of the experts that get LoRA."
    )
    apply_lora_to_output: bool = Field(default=False, description="Use LoRA on the output head (lm_head).")
    vision: Vision = Field(
        default="off",
        description="Parts of a vision-language model's way from image to language model that get LoRA too, on their "
        "linear layers. off: none; projector: what turns the tower's output into the language model's input; tower: "
        "the vision tower and the projector.",
    )
    layers: str | None = Field(
        default=None,
        pattern=NUMBERS_PATTERN,
        max_length=NUMBERS_LENGTH,
        description="Layers that get LoRA, e.g. `0-3,12`; left out: all.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the input of LoRA, as a share; routers, which PEFT adapts, have none. 0: no dropout.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale updates by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        default=False,
        description="Use DoRA (arXiv 2402.09353); on attention only, refused where LoRA targets parameters.",
    )
    quantize_base: bool = Field(
        default=False, description="Keep the frozen experts and linear layers quantised (QLoRA, arXiv 2305.14314)."
    )
    quantize_bits: Literal[4, 8] = Field(
        default=4,
        description="Bits of each weight with `quantize_base`: 4 (NF4) or 8 (dynamic), in blocks with one scale each.",
    )
    quantize_scales: bool = Field(
        default=False,
        description="Quantise the scales of a base in 4 bits to 8 bits (double quantisation): 4.127 bits a weight in "
        "all instead of 4.5.",
    )

    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Data type of LoRA's weights and gradients. bf16 halves both. It needs training.dtype bf16 and an "
        "optimiser of bitsandbytes (`optimizer.optimizer_type`), which steps in fp32 and rounds each number up or "
        "down at random, so that small steps are not lost.",
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

    @property
    def is_for_routers_alone(self) -> bool:
        """Whether nothing but routers can get LoRA, which `moe.train_router` asks for."""
        return not (
            self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output or self.vision != "off"
        )

    @model_validator(mode="after")
    def _plan_and_its_settings_agree(self) -> "Adapter":
        if self.plan in ("all_experts", "per_expert") and not self.apply_lora_to_mlp:
            raise ValueError(f"plan: {self.plan!r} adapts experts; expected apply_lora_to_mlp true with it")
        if self.plan in ("all_experts", "per_expert") and self.use_dora:
            raise ValueError(f"use_dora: true is not valid with plan {self.plan!r}, because PEFT has no DoRA on the "
                             "parameters that experts are")  # fmt: skip
        if self.plan == "per_expert" and not (self.rules or self.from_analysis or self.init_from):
            raise ValueError("rules: plan 'per_expert' needs at least one, such as {\"layers\": \"0-3\", "
                             "\"experts\": {\"0\": 16}}, or from_analysis, or init_from")  # fmt: skip
        for name in ("rules", "from_analysis", "rules_from"):
            if getattr(self, name) and self.plan != "per_expert":
                verb = "are" if name == "rules" else "is"
                raise ValueError(f"{name}: {verb} used by plan 'per_expert' only, and plan is {self.plan!r}")
        if self.quantize_bits != 4 and not self.quantize_base:
            raise ValueError("quantize_bits: is used only with quantize_base true")
        if self.quantize_scales and not (self.quantize_base and self.quantize_bits == 4):
            raise ValueError("quantize_scales: true is used only with quantize_base true and quantize_bits 4")
        if self.quantize_base and self.use_dora:
            raise ValueError("use_dora: true is not valid with quantize_base true, because DoRA reads the weights")
        return self
