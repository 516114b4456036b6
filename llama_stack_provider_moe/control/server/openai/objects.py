"""OpenAI's fine-tuning objects, as this server answers them; a test parses each answer with the openai package."""

from typing import Literal

from pydantic import BaseModel, Field

from llama_stack_provider_moe.control.server.wire import JsonObject


def _absent(value: object) -> bool:
    """Of fields that OpenAI's types have as optional, but not as null: TypeScript tells these apart."""
    return value is None


FineTuningStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class OpenAIErrorDetails(BaseModel):
    """The content of an error of the fine-tuning API."""

    message: str = Field(description="Text for a person: the field, its value, and the expected value.")
    type: str = Field(description="Kind of error, such as `invalid_request_error`.")
    param: str | None = Field(description="Field or parameter with the mistake, where the error has one.")
    code: str = Field(description="Cause, such as `invalid_value` or `not_found`.")


class OpenAIError(BaseModel):
    """The answer to every request of the fine-tuning API that was refused or failed."""

    error: OpenAIErrorDetails


class FineTuningHyperparameters(BaseModel):
    """What a job was trained with; `auto` values are resolved. Left out where the job's specification can't be read."""

    n_epochs: int | None = Field(default=None, exclude_if=_absent)
    batch_size: int | None = Field(
        default=None,
        exclude_if=_absent,
        description="Rows (or pairs, or for reinforcement prompts) in one optimiser step of all processes.",
    )
    learning_rate_multiplier: float | None = Field(
        default=None,
        exclude_if=_absent,
        description="Learning rate divided by the method's base: 1e-4 for supervised, 5e-6 for dpo, 1e-5 for "
        "reinforcement.",
    )


class DPOHyperparameters(FineTuningHyperparameters):
    """The same, with DPO's own."""

    beta: float | None = Field(default=None, exclude_if=_absent)


class SupervisedMethod(BaseModel):
    """Supervised fine-tuning."""

    hyperparameters: FineTuningHyperparameters


class DPOMethod(BaseModel):
    """Direct preference optimisation."""

    hyperparameters: DPOHyperparameters


class ReinforcementHyperparameters(FineTuningHyperparameters):
    """The same, with those of reinforcement."""

    compute_multiplier: float | None = Field(
        default=None, exclude_if=_absent, description="Answers to each prompt, divided by 4."
    )


class ReinforcementMethod(BaseModel):
    """Reinforcement fine-tuning."""

    grader: JsonObject
    hyperparameters: ReinforcementHyperparameters


class FineTuningMethod(BaseModel):
    """The method of a job; only the block of its type is set."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = Field(default=None, exclude_if=_absent)
    dpo: DPOMethod | None = Field(default=None, exclude_if=_absent)
    reinforcement: ReinforcementMethod | None = Field(default=None, exclude_if=_absent)


class WandbRun(BaseModel):
    """Where Weights & Biases has the figures of a job."""

    project: str
    entity: str | None = None


class FineTuningIntegration(BaseModel):
    """A tracker that gets the figures of a job."""

    type: Literal["wandb"] = "wandb"
    wandb: WandbRun


class FineTuningFailure(BaseModel):
    """Why a job failed."""

    code: str = Field(description="Kind of failure, such as `data_error`, from the class of the training's error.")
    message: str
    param: str | None = Field(description="`training_file` for rows that can't be used, `model` for the model.")


class FineTuningJob(BaseModel):
    """A job that trains, as the fine-tuning API shows it."""

    id: str = Field(description="`ftjob-` and the name of the job.")
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(description="Unix time in seconds, as all times of this API.")
    finished_at: int | None
    estimated_finish: int | None = Field(description="When training is expected to end; null until there is a step.")
    model: str
    fine_tuned_model: str | None = Field(
        description="Name of the result once the job has succeeded: its id in the server's inference, if it is served "
        "there, else the name of the job. A later job can use either as `model`."
    )
    organization_id: str = Field(description="`org-` and the beginning of the hash of the owner.")
    status: FineTuningStatus
    hyperparameters: FineTuningHyperparameters
    method: FineTuningMethod | None = Field(
        exclude_if=_absent,
        description="Left out for a recipe that this API has no method for, and for rewards that are not one grader.",
    )
    seed: int
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="Id of the file with the figures of each step, once it has succeeded.")
    trained_tokens: int | None = Field(description="Tokens of all optimiser steps, once it has succeeded.")
    error: FineTuningFailure | None
    integrations: list[FineTuningIntegration] | None
    metadata: dict[str, str] | None


class FineTuningJobs(BaseModel):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: JsonObject | None = Field(default=None, description="Figures of an event of type `metrics`.")


class FineTuningEvents(BaseModel):
    """A page of a job's events, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpointMetrics(BaseModel):
    """Figures of a checkpoint; losses in nats."""

    step: int
    train_loss: float | None = Field(default=None, exclude_if=_absent)
    full_valid_loss: float | None = Field(
        default=None, exclude_if=_absent, description="Left out where no rows are held out."
    )


class FineTuningCheckpoint(BaseModel):
    """A checkpoint of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str = Field(description="`JOB/NAME`; a later job can use it as `model`.")
    fine_tuning_job_id: str
    step_number: int
    metrics: FineTuningCheckpointMetrics


class FineTuningCheckpoints(BaseModel):
    """A page of a job's checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResultFile(BaseModel):
    """The description of a result file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune-results"] = "fine-tune-results"
    status: Literal["processed"] = "processed"
