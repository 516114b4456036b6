"""Requests and answers of the post-training API.

Field by field those of llama-stack-api 0.6.1, the last release that has them (a test compares the two), and ours on
every host. What we add is optional: the blocks `moe`, `adapter` and `options`, for which an SDK has `extra_body`.
Requests carry types only; the defaults and ranges stand in `spec`, where `host.convert` takes a request.
"""

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from llama_stack_provider_moe.jobs.exports import ExportStep
from llama_stack_provider_moe.jobs.folder import Metrics
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.spec import Adapter, CircuitBreaker, DPOOptions, Exports, Moe, Options
from llama_stack_provider_moe.spec.blocks import Resources
from llama_stack_provider_moe.spec.evaluation import SafetyEvaluation


class SFTOptions(Options):
    """The options of a supervised fine-tuning request, in which the block of another recipe may stand."""

    circuit_breaker: CircuitBreaker | None = Field(
        default=None, description="Makes it a job of recipe `circuit_breaker`, with this block."
    )


def _schema(block: type[BaseModel]) -> dict[str, Any]:
    """A block's JSON schema without references: within a larger document `#/$defs/...` would lead nowhere."""
    schema = block.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, list):
            return [whole(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = {**parts[node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
        return {key: whole(value) for key, value in node.items()}

    found: dict[str, Any] = whole(schema)
    return found


# Documented as the blocks they are, and validated with the whole job, when the server's defaults lie beneath them.
AdapterBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(Adapter))]
MoeBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(Moe))]
OptionsBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(SFTOptions))]
DPOOptionsBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(DPOOptions))]
EvalBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(SafetyEvaluation))]
ExportBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(Exports))]
ResourcesBlock = Annotated[dict[str, Any], WithJsonSchema(_schema(Resources))]


def _spelled(value: float) -> float | str:
    """JSON has no NaN and no infinity, and a diverged loss must not become "not known": they are given as text."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


Figure = Annotated[float, PlainSerializer(_spelled, return_type=float | Literal["NaN", "Infinity", "-Infinity"])]


class Wire(BaseModel):
    """Base of every request: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DataConfig(Wire):
    """Which rows, and how they are read."""

    dataset_id: str = Field(description="Data set of the training rows.")
    batch_size: int = Field(description="Rows (or pairs) in one micro-batch.")
    shuffle: bool = Field(description="Shuffle the training rows before every epoch.")
    data_format: Literal["instruct", "dialog"] = Field(
        description="instruct: single-turn rows; dialog: rows of messages; a row of the other kind is refused."
    )
    validation_dataset_id: str | None = Field(
        default=None, description="Held-out data set; left out, a part of the rows is held out."
    )
    packed: bool | None = Field(default=False, description="SFT: fill sequences with several rows.")
    train_on_input: bool | None = Field(default=False, description="SFT: loss on prompt tokens too.")


class OptimizerConfig(Wire):
    """The optimiser and its learning rate."""

    optimizer_type: Literal["adam", "adamw", "sgd"] = Field(description="torch.optim's Adam, AdamW or SGD.")
    lr: float = Field(description="Peak learning rate.")
    weight_decay: float = Field(description="Weight decay.")
    num_warmup_steps: int = Field(description="Optimiser steps over which the rate rises from 0 to `lr`.")


class EfficiencyConfig(Wire):
    """Memory against time."""

    enable_activation_checkpointing: bool | None = Field(
        default=False, description="Recompute activations in backward."
    )
    enable_activation_offloading: bool | None = Field(default=False, description="Not offered: true is refused.")
    memory_efficient_fsdp_wrap: bool | None = Field(default=False, description="Not offered: true is refused.")
    fsdp_cpu_offload: bool | None = Field(default=False, description="Not offered: true is refused.")


class TrainingConfig(Wire):
    """How long, on what and how."""

    n_epochs: int = Field(description="Passes over the training rows.")
    max_steps_per_epoch: int = Field(
        default=0,
        description="Optimiser steps after which an epoch ends; 0 or left out: the whole epoch. (The API's own "
        "default of 1 would train one step.)",
    )
    gradient_accumulation_steps: int = Field(default=1, description="Micro-batches in one optimiser step.")
    max_validation_steps: int | None = Field(
        default=0, description="Micro-batches in one evaluation; 0 or left out: all held-out rows."
    )
    data_config: DataConfig | None = Field(default=None, description="Required: it names the rows.")
    optimizer_config: OptimizerConfig | None = Field(default=None, description="Left out: the server's defaults.")
    efficiency_config: EfficiencyConfig | None = Field(default=None, description="Left out: the server's defaults.")
    dtype: str | None = Field(default="bf16", description="fp32, bf16 or fp16; left out: the server's default.")


class LoraFinetuningConfig(Wire):
    """LoRA, the one algorithm of the API's two that is offered."""

    type: Literal["LoRA"] = "LoRA"
    lora_attn_modules: list[str] = Field(description="Of q_proj, k_proj, v_proj and output_proj.")
    apply_lora_to_mlp: bool = Field(description="LoRA on the MLP: every expert's own, shared experts, dense layers.")
    apply_lora_to_output: bool = Field(description="LoRA on the output head.")
    rank: int = Field(description="Rank of every update.")
    alpha: float = Field(description="Updates are scaled by alpha / rank.")
    use_dora: bool | None = Field(default=False, description="DoRA; refused where experts are targets.")
    quantize_base: bool | None = Field(default=False, description="Hold the frozen base in 4 bits.")

    @model_validator(mode="before")
    @classmethod
    def _only_lora(cls, value: Any) -> Any:
        # Told first: the fields of another algorithm would otherwise be reported one by one as unknown.
        if isinstance(value, dict) and value.get("type", "LoRA") != "LoRA":
            raise ValueError(f"type {str(value['type'])[:40]!r} is not offered; expected 'LoRA', or no "
                             "algorithm_config for the server's default")  # fmt: skip
        return value


class DPOAlignmentConfig(Wire):
    """Direct preference optimisation."""

    beta: float = Field(description="Strength of the tie to the reference model.")
    loss_type: str = Field(default="sigmoid", description="The preference loss, by TRL's name.")


class SupervisedFineTuneRequest(Wire):
    """A supervised fine-tuning job."""

    job_uuid: str = Field(description="Name of the job.")
    training_config: TrainingConfig
    hyperparam_search_config: dict[str, Any] = Field(description="Must be empty: there is no search.")
    logger_config: dict[str, Any] = Field(
        description="Trackers: `tensorboard`, `trackio`, `mlflow`, `wandb`, each with its settings; may be empty."
    )
    model: str | None = Field(default=None, description="Required: hub id, or a folder under an allowed root.")
    checkpoint_dir: str | None = Field(default=None, description="Checkpoints go to a folder of the job's in this one.")
    algorithm_config: LoraFinetuningConfig | None = Field(
        default=None, description="Left out: the server's default adapter, or all weights where it has none."
    )
    adapter: AdapterBlock | None = Field(
        default=None, description="Ours: what `algorithm_config` has no field for; null trains all weights."
    )
    moe: MoeBlock | None = Field(default=None, description="Ours: Mixture-of-Experts settings.")
    options: OptionsBlock | None = Field(
        default=None, description="Ours: seed, lengths, scheduler, split; with `circuit_breaker`, that recipe's block."
    )
    eval: EvalBlock | None = Field(default=None, description="Ours: safety evaluation before and after.")
    export: ExportBlock | None = Field(default=None, description="Ours: what is made of the result, ready to serve.")
    resources: ResourcesBlock | None = Field(default=None, description="Ours: GPUs, and processes that train together.")


class PreferenceOptimizeRequest(Wire):
    """A preference optimisation (DPO) job."""

    job_uuid: str = Field(description="Name of the job.")
    finetuned_model: str = Field(description="Hub id, or a folder under an allowed root.")
    algorithm_config: DPOAlignmentConfig
    training_config: TrainingConfig
    hyperparam_search_config: dict[str, Any] = Field(description="Must be empty: there is no search.")
    logger_config: dict[str, Any] = Field(
        description="Trackers: `tensorboard`, `trackio`, `mlflow`, `wandb`, each with its settings; may be empty."
    )
    adapter: AdapterBlock | None = Field(
        default=None, description="Ours: LoRA; left out, the server's default; null trains all weights."
    )
    moe: MoeBlock | None = Field(default=None, description="Ours: Mixture-of-Experts settings.")
    options: DPOOptionsBlock | None = Field(default=None, description="Ours: seed, lengths, scheduler, split.")
    eval: EvalBlock | None = Field(default=None, description="Ours: safety evaluation before and after.")
    export: ExportBlock | None = Field(default=None, description="Ours: what is made of the result, ready to serve.")
    resources: ResourcesBlock | None = Field(default=None, description="Ours: GPUs, and processes that train together.")


class ErrorMessage(BaseModel):
    """What went wrong."""

    message: str = Field(description="For a person: the field, its value, what would be right.")


class Error(BaseModel):
    """The answer of every request that was refused or failed."""

    error: ErrorMessage


class CancelTrainingJobRequest(Wire):
    """Body of the old family's cancel route."""

    job_uuid: str


class PostTrainingJob(BaseModel):
    """A job, by name."""

    job_uuid: str


class JobLine(PostTrainingJob):
    """A job in a list of jobs; all but the name are ours."""

    status: JobState
    recipe: str
    parent: str | None = Field(description="Of an export: the job that it is of.")
    model: str
    scheduled_at: datetime
    started_at: datetime | None
    completed_at: datetime | None


class ListPostTrainingJobsResponse(BaseModel):
    """The caller's jobs, newest first."""

    data: list[JobLine]
    has_more: bool


class Checkpoint(BaseModel):
    """One thing a job leaves, a checkpoint or a final artifact; from `kind` on, the fields are ours."""

    identifier: str
    created_at: datetime
    epoch: int
    post_training_job_id: str
    path: str
    training_metrics: Metrics | None = None
    kind: str
    step: int
    bytes: int
    name: str = Field(description="Ends the URL of its files.")
    sha256: str | None = Field(description="Of the GGUF file; of what has many files, of its checksums.json.")
    verification: dict[str, Any] | None = Field(description="What was compared before it was listed, with figures.")


class ExportJob(PostTrainingJob):
    """An export of a job, and the steps that it consists of."""

    status: JobState
    reason: str | None = Field(description="Why it failed or was cancelled.")
    scheduled_at: datetime
    completed_at: datetime | None
    steps: list[ExportStep] = Field(description="None before it has begun.")


class ListExportsResponse(BaseModel):
    """A job's exports, newest first."""

    data: list[ExportJob]


class PostTrainingJobStatusResponse(BaseModel):
    """How a job stands; `resources_allocated` carries its progress."""

    job_uuid: str
    status: JobState
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = Field(default=None, description="When it ended, however it ended.")
    resources_allocated: dict[str, Any] | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)


class PostTrainingJobArtifactsResponse(BaseModel):
    """What a job has left so far."""

    job_uuid: str
    checkpoints: list[Checkpoint] = Field(default_factory=list)


class ArtifactFile(BaseModel):
    """One file of an artifact."""

    path: str = Field(description="Within the artifact, with `/`; ends the URL that it is fetched by.")
    bytes: int
    sha256: str = Field(description="Of the file as the job wrote it.")


class ArtifactFiles(BaseModel):
    """What an artifact consists of."""

    identifier: str
    kind: str
    bytes: int
    files: list[ArtifactFile]


class PostTrainingJobLogStream(BaseModel):
    """Lines of a job's output; `next_offset` is the `offset` of the next look."""

    job_uuid: str
    log_lines: list[str]
    next_offset: int = Field(description="Bytes of the output up to here.")


class Events(BaseModel):
    """A page of a job's events, as its training processes wrote them; oldest first."""

    job_uuid: str
    events: list[dict[str, Any]] = Field(
        description="Each has `type` and `time`; a run that was resumed has all tries."
    )
    cursor: int = Field(description="`cursor` of the next page; the same again where there is nothing new.")
    unreadable: int = Field(description="Lines that are no events, such as one that a full disk cut short.")


class EvaluationPoint(BaseModel):
    """Figures on the held-out rows after a step; 0: before training."""

    step: int
    epoch: Figure
    metrics: dict[str, Figure]


class MetricSeries(BaseModel):
    """What a job's steps measured, as columns of equal length; steps that were undone by a resumption are left out."""

    job_uuid: str
    steps: list[int] = Field(description="Optimiser steps, rising.")
    epoch: list[Figure]
    metrics: dict[str, list[Figure | None]] = Field(description="By name; null where a step has no such figure.")
    evaluations: list[EvaluationPoint]


class JobDetail(PostTrainingJobStatusResponse):
    """A job whole."""

    recipe: str
    model: str
    parent: str | None = Field(description="Of an export: the job that it is of.")
    cancel_requested_at: datetime | None
    attempts: int
    reason: str | None = Field(description="Why it failed or was cancelled, or is tried again.")
    folder: str
    spec: dict[str, Any] | None = Field(description="The job in full, defaults filled in; of a damaged file, what "
                                        "is `unreadable`.")  # fmt: skip
    resolved: dict[str, Any] | None = Field(description="What was decided from the model, once it is loaded.")
    summary: dict[str, float] | None = Field(description="Final figures of a completed job.")


class DeletedJob(PostTrainingJob):
    """A job that is no more."""

    kept: list[str] = Field(description="Folders that were left: checkpoints in a `checkpoint_dir`.")
    exports: list[str] = Field(description="Exports of the job, which went with it.")


class Validated(BaseModel):
    """What a job would be; nothing was created."""

    spec: dict[str, Any]
    train_rows: int = Field(description="0 where nothing is trained.")
    validation_rows: int | None = Field(
        description="None: they will be held out of the training rows, or nothing is trained."
    )
    rows: dict[str, int] = Field(description="Of each data set, by the name of its file in the job's folder.")


class Health(BaseModel):
    """Whether jobs can be taken and run."""

    status: Literal["ok", "error"]
    store: Literal["ok", "unreachable"]
    supervisor: Literal["alive", "none"]
    jobs: dict[JobState, int]
