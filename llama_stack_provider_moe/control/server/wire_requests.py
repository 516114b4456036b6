"""Requests of the post-training API. They have types only; defaults and ranges are in `spec`.

The models have the fields of llama-stack-api 0.6.1, the last release with this API (a test compares them), and serve
every host. Our additions are optional: the blocks `moe`, `adapter` and `options`, which SDKs send with `extra_body`.
`control.server.api_requests` maps requests to `spec`.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from llama_stack_provider_moe.control.server.schemas import SchemaOf
from llama_stack_provider_moe.control.server.wire import JsonObject
from llama_stack_provider_moe.spec import Adapter, CircuitBreaker, DPOOptions, Exports, Moe, Options
from llama_stack_provider_moe.spec.blocks import NoBoolAsNumber, Resources
from llama_stack_provider_moe.spec.evaluation import SafetyEvaluation
from llama_stack_provider_moe.spec.labels import MAX_LABELS, LabelKey, LabelValue, Note
from llama_stack_provider_moe.spec.moe import ExpertsBackend
from llama_stack_provider_moe.spec.notify import Notify

# Descriptions of fields that several models have.
_UNSUPPORTED = "Unsupported; true is an error."
_NO_SEARCH = "Hyperparameter search; must be empty, because this route makes one job. `POST sweeps` makes several."
_TRACKERS = "Trackers: `tensorboard`, `trackio`, `mlflow`, `wandb`, each with its settings; may be empty."
_MOE = "Extension: Mixture-of-Experts settings."
_EVAL = "Extension: safety evaluation before and after training."
_EXPORT = "Extension: exports of the result for serving."
_LABELS = "Extension: labels to find the job by; they can be changed later."
_NOTE = "Extension: your own words about the job; they can be changed later."
_NOTIFY = "Extension: whom to tell when the job has ended, by a webhook."
_RESOURCES = "Extension: GPUs, and the number of processes that train together."


class SFTOptions(Options):
    """The options of a supervised fine-tuning request, which may contain the block of another recipe."""

    circuit_breaker: CircuitBreaker | None = Field(
        default=None, description="Circuit breaker settings; they make the job one of recipe `circuit_breaker`."
    )


# The document shows the real blocks. They are validated with the complete job, once it has the server's defaults.
AdapterBlock = Annotated[JsonObject, SchemaOf(Adapter)]
MoeBlock = Annotated[JsonObject, SchemaOf(Moe)]
OptionsBlock = Annotated[JsonObject, SchemaOf(SFTOptions)]
DPOOptionsBlock = Annotated[JsonObject, SchemaOf(DPOOptions)]
EvalBlock = Annotated[JsonObject, SchemaOf(SafetyEvaluation)]
ExportBlock = Annotated[JsonObject, SchemaOf(Exports)]
NotifyBlock = Annotated[JsonObject, SchemaOf(Notify)]
ResourcesBlock = Annotated[JsonObject, SchemaOf(Resources)]


class Wire(NoBoolAsNumber):
    """Base of every request; rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DataConfig(Wire):
    """The data sets, and how the job reads them."""

    dataset_id: str = Field(description="Data set of the training rows.")
    batch_size: int = Field(description="Rows (or pairs) in one micro-batch.")
    shuffle: bool = Field(description="Whether to shuffle the training rows before every epoch.")
    data_format: Literal["instruct", "dialog"] = Field(
        description="Format of the rows: `instruct` for single turns, `dialog` for messages; other rows are errors."
    )
    validation_dataset_id: str | None = Field(
        default=None, description="Held-out data set; by default a part of the training rows is held out."
    )
    packed: bool | None = Field(default=False, description="SFT: whether to fill sequences with several rows.")
    train_on_input: bool | None = Field(default=False, description="SFT: whether prompt tokens count in the loss.")


class OptimizerConfig(Wire):
    """The optimiser and its learning rate."""

    optimizer_type: Literal["adam", "adamw", "sgd"] = Field(description="Optimiser: Adam, AdamW or SGD of torch.optim.")
    lr: float = Field(description="Peak learning rate.")
    weight_decay: float = Field(description="Weight decay.")
    num_warmup_steps: int = Field(description="Optimiser steps over which the learning rate rises from 0 to `lr`.")


class EfficiencyConfig(Wire):
    """Settings that trade memory for time."""

    enable_activation_checkpointing: bool | None = Field(
        default=False, description="Whether to recompute activations in the backward pass."
    )
    enable_activation_offloading: bool | None = Field(default=False, description=_UNSUPPORTED)
    memory_efficient_fsdp_wrap: bool | None = Field(default=False, description=_UNSUPPORTED)
    fsdp_cpu_offload: bool | None = Field(default=False, description=_UNSUPPORTED)


class TrainingConfig(Wire):
    """Length of the training, data, optimiser and precision."""

    n_epochs: int = Field(description="Passes over the training rows.")
    max_steps_per_epoch: int = Field(
        default=0,
        description="Optimiser steps after which an epoch ends; 0, the default, is the whole epoch. (The API's own "
        "default of 1 would train one step.)",
    )
    gradient_accumulation_steps: int = Field(default=1, description="Micro-batches in one optimiser step.")
    max_validation_steps: int | None = Field(
        default=0, description="Micro-batches in one evaluation; 0, the default, is all held-out rows."
    )
    data_config: DataConfig | None = Field(default=None, description="Data sets. Required.")
    optimizer_config: OptimizerConfig | None = Field(
        default=None, description="Optimiser settings; the server's by default."
    )
    efficiency_config: EfficiencyConfig | None = Field(
        default=None, description="Memory settings; the server's by default."
    )
    dtype: str | None = Field(default="bf16", description="Precision: fp32, bf16 or fp16; the server's by default.")


class LoraFinetuningConfig(Wire):
    """LoRA, the only one of the API's two algorithms that this provider supports."""

    type: Literal["LoRA"] = "LoRA"
    lora_attn_modules: list[str] = Field(
        description="Attention modules with LoRA, from q_proj, k_proj, v_proj and output_proj."
    )
    apply_lora_to_mlp: bool = Field(
        description="Whether the MLPs get LoRA: every expert separately, shared experts, dense layers."
    )
    apply_lora_to_output: bool = Field(description="Whether the output head gets LoRA.")
    rank: int = Field(description="Rank of every update.")
    alpha: float = Field(description="Scale of the updates: alpha / rank.")
    use_dora: bool | None = Field(default=False, description="Whether to use DoRA; an error where experts are targets.")
    quantize_base: bool | None = Field(default=False, description="Whether to keep the frozen base in 4 bits.")

    @model_validator(mode="before")
    @classmethod
    def _only_lora(cls, value: object) -> object:
        # Before the fields: otherwise those of another algorithm would be reported one by one as unknown.
        if isinstance(value, dict) and value.get("type", "LoRA") != "LoRA":
            raise ValueError(f"type {str(value['type'])[:40]!r} is not supported; expected 'LoRA', or no "
                             "algorithm_config for the server's default")  # fmt: skip
        return value


class DPOAlignmentConfig(Wire):
    """Settings of direct preference optimisation."""

    beta: float = Field(description="Strength of the penalty for diverging from the reference model.")
    loss_type: str = Field(default="sigmoid", description="Preference loss, by TRL's name.")


class SupervisedFineTuneRequest(Wire):
    """A supervised fine-tuning job."""

    job_uuid: str = Field(description="Name of the job.")
    training_config: TrainingConfig
    hyperparam_search_config: JsonObject = Field(description=_NO_SEARCH)
    logger_config: JsonObject = Field(description=_TRACKERS)
    model: str | None = Field(
        default=None, description="Model: a job's name, a hub id, or an allowed folder. Required."
    )
    checkpoint_dir: str | None = Field(
        default=None, description="Folder for checkpoints; each job gets a subfolder in it."
    )
    algorithm_config: LoraFinetuningConfig | None = Field(
        default=None, description="LoRA settings; by default the server's adapter, or all weights if it has none."
    )
    adapter: AdapterBlock | None = Field(
        default=None, description="Extension: adapter settings beyond `algorithm_config`; null trains all weights."
    )
    moe: MoeBlock | None = Field(default=None, description=_MOE)
    options: OptionsBlock | None = Field(
        default=None,
        description="Extension: seed, lengths, scheduler and split; with `circuit_breaker`, that recipe's block.",
    )
    eval: EvalBlock | None = Field(default=None, description=_EVAL)
    export: ExportBlock | None = Field(default=None, description=_EXPORT)
    resources: ResourcesBlock | None = Field(default=None, description=_RESOURCES)
    labels: dict[str, str] | None = Field(default=None, description=_LABELS)
    note: str | None = Field(default=None, description=_NOTE)
    notify: NotifyBlock | None = Field(default=None, description=_NOTIFY)


class PreferenceOptimizeRequest(Wire):
    """A preference optimisation (DPO) job."""

    job_uuid: str = Field(description="Name of the job.")
    finetuned_model: str = Field(description="Model: a job's name, a hub id, or a folder under an allowed root.")
    algorithm_config: DPOAlignmentConfig
    training_config: TrainingConfig
    hyperparam_search_config: JsonObject = Field(description=_NO_SEARCH)
    logger_config: JsonObject = Field(description=_TRACKERS)
    adapter: AdapterBlock | None = Field(
        default=None, description="Extension: LoRA settings; the server's by default; null trains all weights."
    )
    moe: MoeBlock | None = Field(default=None, description=_MOE)
    options: DPOOptionsBlock | None = Field(default=None, description="Extension: seed, lengths, scheduler and split.")
    eval: EvalBlock | None = Field(default=None, description=_EVAL)
    export: ExportBlock | None = Field(default=None, description=_EXPORT)
    resources: ResourcesBlock | None = Field(default=None, description=_RESOURCES)
    labels: dict[str, str] | None = Field(default=None, description=_LABELS)
    note: str | None = Field(default=None, description=_NOTE)
    notify: NotifyBlock | None = Field(default=None, description=_NOTIFY)


class JobChange(Wire):
    """Changes of what an owner writes about a job."""

    labels: dict[LabelKey, LabelValue | None] = Field(
        default_factory=dict, max_length=2 * MAX_LABELS, description="Labels to set; null removes one. Others stay."
    )
    note: Note | None = Field(default=None, description="The new note; null removes it; left out: it stays.")


class ResumedMoe(Wire):
    """The settings of a `moe` block that a resumption may change."""

    experts_backend: ExpertsBackend = Field(
        description="Code that computes the experts from now on, in place of the job's `moe.experts_backend`."
    )


class Resumption(Wire):
    """What to change in a job that is resumed; without a body nothing changes."""

    moe: ResumedMoe | None = Field(default=None, description="Settings that replace those of the job's `moe` block.")


class CancelTrainingJobRequest(Wire):
    """Body of the old cancel route."""

    job_uuid: str
