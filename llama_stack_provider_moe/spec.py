"""What a job is asked to do: `JobSpec`, one tagged union by `recipe`.

Every default, every range and every one-line meaning of a job's options stands here and nowhere else.
A template states the few fields a person cares about; `spec.json` in the job's folder states them all.
`None` means "decide from the model" wherever it is a default, and the training process writes what it
decided to `resolved.json`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
PROJECT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

DType = Literal["fp32", "bf16", "fp16"]
Recipe = Literal["sft", "dpo"]
LoadBalancing = Literal["switch"]
RowFormat = Literal["auto", "instruct", "dialog"]
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj"]

# The paired and unpaired losses of TRL's DPOTrainer that were run on the pinned version. The post-training
# API also names `kto_pair`, which TRL has no twin of.
DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip

# Of them, those whose formula has the label smoothing (TRL 1.16): with any other, "sigmoid" too, TRL ignores it.
SMOOTHED_LOSSES = ("exo_pair", "robust", "aot", "aot_unpaired")


class Block(BaseModel):
    """Base of every block: unknown keys are errors, numbers are finite, nothing is coerced in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=False)


class Data(Block):
    """Which rows, and how they are read."""

    dataset_id: str = Field(min_length=1, max_length=512, description="Data set registered with the host.")
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Held-out data set; left out, `options.validation_split` of the rows are held out.",
    )
    format: RowFormat = Field(
        default="auto",
        description="instruct: single-turn rows; dialog: rows of messages; auto: each row says by its keys.",
    )
    shuffle: bool = Field(default=True, description="Shuffle the training rows before every epoch.")
    packed: bool = Field(
        default=False, description="SFT: fill sequences of `options.max_length` tokens with several rows."
    )
    train_on_input: bool = Field(default=False, description="SFT: loss on prompt tokens too, not on the answers alone.")


class Training(Block):
    """How long, and in what pieces."""

    n_epochs: int = Field(default=1, ge=1, le=1000, description="Passes over the training rows.")
    max_steps_per_epoch: int = Field(
        default=0, ge=0, description="Optimiser steps after which an epoch ends; 0: the whole epoch."
    )
    batch_size: int = Field(default=4, ge=1, le=4096, description="Rows (or pairs) in one micro-batch.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=4096, description="Micro-batches in one optimiser step."
    )
    max_validation_steps: int = Field(
        default=0, ge=0, description="Micro-batches in one evaluation; 0: all held-out rows."
    )
    dtype: DType = Field(default="bf16", description="Parameters of the model and autocast; adapters stay in fp32.")


class Optimizer(Block):
    """The optimiser and its learning-rate curve."""

    optimizer_type: Literal["adam", "adamw", "sgd"] = Field(
        default="adamw", description="torch.optim.Adam, AdamW (decoupled weight decay) or SGD (no momentum)."
    )
    lr: float = Field(default=1e-4, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Weight decay.")
    num_warmup_steps: int = Field(
        default=0, ge=0, description="Optimiser steps over which the rate rises from 0 to `lr`."
    )


class Efficiency(Block):
    """Memory against time."""

    enable_activation_checkpointing: bool = Field(
        default=False,
        description="Recompute activations in backward; always non-reentrant, or the aux loss loses its gradient.",
    )


class Adapter(Block):
    """LoRA (Hu et al. 2021, arXiv 2106.09685). A job without this block trains all weights."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank r of every update.")
    alpha: float = Field(default=32, gt=0, le=65536, description="Updates are scaled by alpha / rank.")
    lora_attn_modules: list[AttentionModule] = Field(
        default=["q_proj", "k_proj", "v_proj", "output_proj"],
        description="Attention projections that get LoRA; `output_proj` is the projection back (o_proj).",
    )
    apply_lora_to_mlp: bool = Field(
        default=True,
        description="LoRA on the MLP: every expert's own (distinct), shared experts and dense layers.",
    )
    apply_lora_to_output: bool = Field(default=False, description="LoRA on the output head (lm_head).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on LoRA's input; not on expert parameters.")
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        default=False, description="DoRA (arXiv 2402.09353); refused where expert parameters are targets."
    )

    @field_validator("lora_attn_modules")
    @classmethod
    def _no_duplicates(cls, modules: list[AttentionModule]) -> list[AttentionModule]:
        if len(set(modules)) != len(modules):
            raise ValueError(f"{modules} names a module twice")
        return modules

    @model_validator(mode="after")
    def _targets_something(self) -> "Adapter":
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            raise ValueError("an adapter without a target trains nothing; name lora_attn_modules, or set "
                             "apply_lora_to_mlp or apply_lora_to_output")  # fmt: skip
        return self


class Moe(Block):
    """What is particular to Mixture-of-Experts. On a dense model every default means "nothing to do"."""

    auto_detect_moe: bool = Field(
        default=True,
        description="Find the experts from config and modules; false: treat the model as dense (a MoE is refused).",
    )
    output_router_logits: bool | None = Field(
        default=None, description="Ask the model for its router logits; left out: true on a MoE."
    )
    router_aux_loss_coef: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="Weight of the load-balancing loss; left out: 0.001 where the family has one, else 0.",
    )
    moe_load_balancing: LoadBalancing = Field(
        default="switch",
        description="Which balance loss: Switch Transformer's (arXiv 2101.03961), top-k form.",
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
        description="true: grouped matrix products over experts (on a CPU in bf16, of few shapes); false: the eager "
        "loop.",
    )
    train_router: bool | None = Field(
        default=None, description="Train the routers (LoRA or whole); left out: true when all weights train."
    )


class Options(Block):
    """What the post-training API has no field for."""

    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of weights, row order and the split.")
    max_length: int = Field(default=1024, ge=8, le=1 << 20, description="Tokens of a row kept, from its start.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip the gradient's norm; 0: never.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    validation_split: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Share of rows held out without a validation data set; 0: none.",
    )
    eval_before_training: bool = Field(
        default=True, description="Evaluate the untouched model first, so that a gain can be stated."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Use this named chat template; left out: the model's own."
    )
    save_merged: bool = Field(default=False, description="Also save base plus adapter as one Hugging Face folder.")
    max_hours: float | None = Field(
        default=None,
        gt=0,
        le=8760,
        description="Hours of training, over all starts, after which it stops with all that it has: `completed`.",
    )
    autosave_minutes: float = Field(
        default=30.0, gt=0, le=10080, description="A checkpoint to go on from at least so often, beside each epoch's."
    )
    keep_checkpoints: int = Field(
        default=3, ge=1, le=1000, description="Epochs' checkpoints kept: the last ones, and the best by held-out loss."
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Epochs in a row without a lower held-out loss that end training; the best is then kept.",
    )
    dataloader_workers: int = Field(
        default=0, ge=0, le=64, description="Processes that prepare batches; 0: the training process itself."
    )


class DPOOptions(Options):
    """Options that only preference optimisation has."""

    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of labels taken as flipped; of exo_pair (needs > 0), robust, aot, aot_unpaired only.",
    )
    precompute_ref_log_probs: bool | None = Field(
        default=None, description="Reference log-probabilities once, ahead; left out: when an epoch repeats."
    )


class TensorBoard(Block):
    """Event files below the job's folder: `trackers/tensorboard`."""


class Trackio(Block):
    """A SQLite file for trackio's dashboard: `trackers/trackio`, or TRACKIO_DIR of the server's `child_env`."""

    project: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Its project there.")


class MLflow(Block):
    """A run in `trackers/mlflow/mlflow.db`, or at MLFLOW_TRACKING_URI of the server's `child_env`."""

    experiment: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Its experiment there.")


class WandB(Block):
    """A run in `trackers/wandb`, to be synced by hand; with WANDB_API_KEY in the server's `child_env` it is sent."""

    project: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Its project there.")
    entity: str | None = Field(default=None, pattern=PROJECT_PATTERN, description="User or team it belongs to.")


class Trackers(Block):
    """Where a job's figures go beside its events. Keys and addresses are the server's, never a job's."""

    tensorboard: TensorBoard | None = Field(default=None, description="`{}` writes for TensorBoard.")
    trackio: Trackio | None = Field(default=None, description="`{}` writes for trackio.")
    mlflow: MLflow | None = Field(default=None, description="`{}` writes for MLflow.")
    wandb: WandB | None = Field(default=None, description="`{}` writes for Weights & Biases.")


class Resources(Block):
    """What a job needs of the machine."""

    gpus: int | None = Field(
        default=None, ge=0, le=64, description="GPUs of its own; left out: one where there are any, else the CPU."
    )


class _Job(Block):
    job_uuid: str | None = Field(
        default=None, pattern=JOB_ID_PATTERN, description="Name of the job; left out: one is made."
    )
    model: str = Field(min_length=1, max_length=1024, description="Hub id, or a folder under an allowed root.")
    data: Data = Field(description="A block; its fields follow.")
    training: Training = Field(default_factory=Training)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    efficiency: Efficiency = Field(default_factory=Efficiency)
    adapter: Adapter | None = Field(default=None, description="LoRA settings; null trains all weights.")
    moe: Moe = Field(default_factory=Moe)
    resources: Resources = Field(default_factory=Resources)
    trackers: Trackers = Field(default_factory=Trackers)
    checkpoint_dir: str | None = Field(
        default=None, max_length=1024, description="Checkpoints go to a folder of the job's in this one."
    )

    @model_validator(mode="after")
    def _fp16_needs_an_adapter(self) -> "_Job":
        if self.training.dtype == "fp16" and self.adapter is None:
            raise ValueError("training.dtype: 'fp16' weights can't be trained whole (their updates underflow); "
                             "use 'bf16' or 'fp32', or an adapter")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _early_stopping_needs_held_out_rows(self) -> "_Job":
        options: Options = self.options  # type: ignore[attr-defined]  # every recipe has them, of its own kind
        if options.early_stopping_patience and not (self.data.validation_dataset_id or options.validation_split):
            raise ValueError("options.early_stopping_patience: needs held-out rows; give data.validation_dataset_id "
                             "or options.validation_split > 0")  # fmt: skip
        return self


class SFTSpec(_Job):
    """Supervised fine-tuning."""

    recipe: Literal["sft"] = Field(description="Supervised fine-tuning on conversations.")
    options: Options = Field(default_factory=Options)


class DPOSpec(_Job):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    recipe: Literal["dpo"] = Field(description="Direct preference optimisation on pairs of answers.")
    beta: float = Field(default=0.1, gt=0, le=100, description="Strength of the tie to the reference model.")
    loss_type: DPOLoss = Field(default="sigmoid", description="The preference loss, by TRL's name.")
    options: DPOOptions = Field(default_factory=DPOOptions)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _kto_pair_has_no_twin(cls, loss: Any) -> Any:
        if loss == "kto_pair":
            raise ValueError(f"'kto_pair' is not implemented by TRL; choose one of {', '.join(DPO_LOSSES)}")
        return loss

    @model_validator(mode="after")
    def _settings_that_would_not_be_read(self) -> "DPOSpec":
        if self.options.label_smoothing > 0 and self.loss_type not in SMOOTHED_LOSSES:
            raise ValueError(f"options.label_smoothing: {self.options.label_smoothing} is not read by loss_type "
                             f"{self.loss_type!r}; only {', '.join(SMOOTHED_LOSSES)} know it")  # fmt: skip
        if self.loss_type == "exo_pair" and self.options.label_smoothing == 0:
            raise ValueError("options.label_smoothing: 0.0 is not valid with loss_type 'exo_pair'; expected > 0")
        if self.data.packed:
            raise ValueError("data.packed: true is for SFT only; pairs can't be packed")
        if self.data.train_on_input:
            raise ValueError("data.train_on_input: true is for SFT only; DPO compares answers to one prompt")
        if self.moe.expert_dropout > 0:
            raise ValueError("moe.expert_dropout: is for SFT only; DPO compares two passes, which must not differ")
        return self


JobSpec = Annotated[SFTSpec | DPOSpec, Discriminator("recipe")]
JOB_SPEC: TypeAdapter[SFTSpec | DPOSpec] = TypeAdapter(JobSpec)
DPO_LOSSES: tuple[str, ...] = DPOLoss.__args__  # type: ignore[attr-defined]


class JobDefaults(Block):
    """A server's own defaults for jobs: any part of these blocks; a job's own values go before them."""

    training: dict[str, Any] = Field(default_factory=dict, description="Parts of `training`.")
    optimizer: dict[str, Any] = Field(default_factory=dict, description="Parts of `optimizer`.")
    efficiency: dict[str, Any] = Field(default_factory=dict, description="Parts of `efficiency`.")
    adapter: dict[str, Any] | None = Field(
        default=None, description="Parts of `adapter`; given, jobs that name no adapter get this one."
    )
    moe: dict[str, Any] = Field(default_factory=dict, description="Parts of `moe`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Parts of `options`.")
    trackers: dict[str, Any] = Field(
        default_factory=dict, description="Parts of `trackers`; a job turns one off with null."
    )

    @model_validator(mode="after")
    def _each_part_is_valid(self) -> "JobDefaults":
        # A typing error in a run YAML must stop the server at its start, not the first job at night.
        blocks: dict[str, type[Block]] = {
            "training": Training, "optimizer": Optimizer, "efficiency": Efficiency,
            "adapter": Adapter, "moe": Moe, "options": Options, "trackers": Trackers,
        }  # fmt: skip
        for name, block in blocks.items():
            block.model_validate(getattr(self, name) or {})
        return self

    def under(self, body: dict[str, Any]) -> dict[str, Any]:
        """`body` of a job with these defaults beneath it, block by block; `body` itself is left as it is.

        `"adapter": null` in a body is a choice (train all weights) and stays null.
        """
        merged = dict(body)
        for name in type(self).model_fields:
            defaults = getattr(self, name)
            given = body.get(name, {} if defaults is not None else None)
            if isinstance(given, dict) and defaults:
                merged[name] = {**defaults, **given}
        return merged
