"""The `options` and `trackers` blocks: what the post-training API has no field for."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

PROJECT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


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
    checkpoint_form: Literal["whole", "sharded"] = Field(
        default="whole",
        description="whole: rank 0 gathers and writes it, a model that can be used; sharded: each process writes its "
        "part, for the job to go on from (strategy fsdp with adapter null). What a job leaves is whole always.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Epochs in a row without a lower held-out loss that end training; the best is then kept.",
    )
    deterministic: bool = Field(
        default=False,
        description="Only operations that give the same twice (torch.use_deterministic_algorithms), and kernels with "
        "fixed tiles, not timed ones; one that has no such form ends the job.",
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
