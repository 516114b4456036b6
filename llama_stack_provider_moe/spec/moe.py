"""The `moe` block."""

from typing import Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.blocks import Block

LoadBalancing = Literal["switch", "gshard", "expert_choice", "aux_free"]
ExpertsBackend = Literal["auto", "torch", "triton", "peft"]
BIAS_RATE = 0.001  # DeepSeek-V3's (arXiv 2412.19437, section 4.2)


class Moe(Block):
    """What is particular to Mixture-of-Experts. On a dense model every default means "nothing to do"."""

    auto_detect_moe: bool = Field(
        default=True,
        description="Find the experts from config and modules; false: treat the model as dense (a MoE is refused).",
    )
    output_router_logits: bool | None = Field(
        default=None, description="Ask the model for its router logits; left out: true on a MoE."
    )
    experts_backend: ExpertsBackend = Field(
        default="auto",
        description="Who computes the experts: torch: ours, LoRA beside the weights; triton: ours, by Triton on "
        "a GPU (interpreted and compiled in tests, not yet run on one); peft: transformers' grouped products, LoRA "
        "folded in by PEFT; auto: on a CPU torch, on a GPU the quicker of torch and triton in a trial on a layer of "
        "the model, in which both must agree.",
    )
    router_aux_loss_coef: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="Weight of the load-balancing loss; left out: 0.001 with switch or gshard where the family has "
        "one, else 0.",
    )
    moe_load_balancing: LoadBalancing = Field(
        default="switch",
        description="switch: Switch Transformer's loss (arXiv 2101.03961), top-k form, over all layers together; "
        "gshard: GShard's (2006.16668), each layer by itself; "
        "expert_choice: experts choose tokens, in training only (2202.09368); aux_free: DeepSeek-V3's moved bias "
        "(2408.15664), of families that have one.",
    )
    router_bias_rate: float = Field(
        default=BIAS_RATE, gt=0, le=1, description="aux_free: what an expert's bias moves by in a step."
    )
    router_jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Router inputs are multiplied by 1 +- this at random, in training (arXiv 2101.03961, 2.4).",
    )
    router_z_loss_coef: float = Field(
        default=0.0, ge=0, le=10, description="Weight of mean(logsumexp(router logits)^2) (arXiv 2202.08906)."
    )
    expert_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the experts' inner activation (arXiv 2101.03961, 2.4).",
    )
    enable_moe_optimizations: bool = Field(
        default=True,
        description="true: grouped matrix products over experts, see `experts_backend`; false: the eager loop.",
    )
    train_router: bool | None = Field(
        default=None, description="Train the routers (LoRA or whole); left out: true when all weights train."
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> "Moe":
        if not self.enable_moe_optimizations and self.experts_backend in ("torch", "triton"):
            raise ValueError(f"experts_backend: {self.experts_backend!r} is not valid with enable_moe_optimizations "
                             "false")  # fmt: skip
        ours = self.enable_moe_optimizations and self.experts_backend != "peft"
        if self.moe_load_balancing == "expert_choice" and not ours:
            raise ValueError("moe_load_balancing: 'expert_choice' needs our experts: experts_backend 'auto', "
                             "'torch' or 'triton', enable_moe_optimizations true")  # fmt: skip
        if self.router_bias_rate != BIAS_RATE and self.moe_load_balancing != "aux_free":
            raise ValueError("router_bias_rate: is read only with moe_load_balancing 'aux_free'")
        return self
