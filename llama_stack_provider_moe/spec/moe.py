"""The `moe` block."""

from typing import Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.blocks import Block

LoadBalancing = Literal["switch", "gshard", "expert_choice", "aux_free"]
ExpertsBackend = Literal["auto", "torch", "triton", "quack", "peft"]
# The routers' biases, beside an adapter or a model that was trained with `aux_free`.
ROUTER_BIAS_FILE = "router_bias.safetensors"
BIAS_RATE = 0.001  # DeepSeek-V3's (arXiv 2412.19437, section 4.2)


class Moe(Block):
    """Settings of Mixture-of-Experts models. On a dense model every default means "do nothing"."""

    auto_detect_moe: bool = Field(
        default=True,
        description="Find the experts from the config and the modules; false: treat the model as dense, and refuse a "
        "Mixture-of-Experts model.",
    )
    output_router_logits: bool | None = Field(
        default=None, description="Ask the model for its router logits; left out: true on a Mixture-of-Experts model."
    )
    experts_backend: ExpertsBackend = Field(
        default="auto",
        description="Code that computes the experts. torch: ours, with LoRA beside the weights; triton: ours, in "
        "Triton on a GPU (interpreted and compiled in tests, not yet run on one); quack: ours, with the grouped "
        "products of quack-kernels on a GPU (extra `quack`; not yet run on one); peft: transformers' "
        "grouped products, with LoRA merged in by PEFT; auto: torch on a CPU; on a GPU the fastest of "
        "torch, triton and, if it is installed, quack in a trial of one layer in a child process, in which they must "
        "agree; a failed trial means torch, and so does a kernel that fails in training.",
    )
    router_aux_loss_coef: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="Weight of the load-balancing loss; left out: 0.001 with switch or gshard if the model family has "
        "one, else 0.",
    )
    moe_load_balancing: LoadBalancing = Field(
        default="switch",
        description="Method that balances the load of the experts. switch: the loss of Switch Transformers (arXiv "
        "2101.03961), top-k form, over all layers together; gshard: GShard's loss (arXiv 2006.16668), for "
        "each layer separately; expert_choice: experts choose tokens, in training only (arXiv "
        "2202.09368); aux_free: DeepSeek-V3's bias updates (arXiv 2408.15664), for families with such a "
        "bias.",
    )
    router_bias_rate: float = Field(
        default=BIAS_RATE, gt=0, le=1, description="Amount by which aux_free changes an expert's bias in one step."
    )
    router_jitter: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Random noise on the input of routers in training: each is multiplied by a factor from 1 - this "
        "to 1 + this (arXiv 2101.03961, 2.4). 0: none.",
    )
    router_z_loss_coef: float = Field(
        default=0.0, ge=0, le=10, description="Weight of mean(logsumexp(router logits)^2) (arXiv 2202.08906); 0: none."
    )
    expert_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the experts' inner activation, as a share (arXiv 2101.03961, 2.4); 0: none.",
    )
    enable_moe_optimizations: bool = Field(
        default=True,
        description="Compute experts by grouped matrix products (see `experts_backend`); false: by the model's own "
        "loop.",
    )
    train_router: bool | None = Field(
        default=None,
        description="Train the routers (with LoRA, or all their weights); left out: true if all weights train.",
    )
    train_router_only: bool = Field(
        default=False,
        description="Train all weights of the routers and nothing else; with `adapter` null. For LoRA on routers alone "
        "set `adapter.lora_attn_modules` [], `adapter.apply_lora_to_mlp` false and `train_router` true.",
    )
    routing_every_n_steps: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Steps from one table of every expert's share in the events to the next; 1: at each step. Every "
        "step has figures of each layer, and a table covers all steps since the one before. The first step and those "
        "with a checkpoint have one too. Left out: so often that tables take some 2 KB a step, which is 1 on a small "
        "model, and 50 with 128 experts in each of 48 layers.",
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> "Moe":
        if not self.enable_moe_optimizations and self.experts_backend in ("torch", "triton", "quack"):
            raise ValueError(f"experts_backend: {self.experts_backend!r} is not valid with enable_moe_optimizations "
                             "false")  # fmt: skip
        ours = self.enable_moe_optimizations and self.experts_backend != "peft"
        if self.moe_load_balancing == "expert_choice" and not ours:
            raise ValueError("moe_load_balancing: 'expert_choice' needs our code for experts: experts_backend "
                             "'auto', 'torch', 'triton' or 'quack', and enable_moe_optimizations true")  # fmt: skip
        if self.train_router_only and self.train_router is False:
            raise ValueError("train_router: false is not valid with train_router_only true; leave one of them out")
        if self.router_bias_rate != BIAS_RATE and self.moe_load_balancing != "aux_free":
            raise ValueError("router_bias_rate: is used only with moe_load_balancing 'aux_free'")
        return self
