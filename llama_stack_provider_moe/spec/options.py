"""The `options` and `trackers` blocks: settings that the post-training API has no field for."""

from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

PROJECT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


ROPE_FILE = "rope_scaling.json"  # beside an adapter whose base had its rotary embeddings scaled


class RopeScaling(Block):
    """A longer context than the model was trained on, by scaled rotary position embeddings (RoPE)."""

    type: Literal["yarn", "linear"] = Field(
        default="yarn",
        description="Method. yarn: low frequencies are interpolated, high ones stay, and attention is scaled (YaRN, "
        "arXiv 2309.00071); linear: every position is divided by the factor (arXiv 2306.15595).",
    )
    factor: float = Field(gt=1, le=1024, description="Number of times the model's context becomes longer.")


class Options(Block):
    """Settings that the post-training API has no field for."""

    seed: int = Field(
        default=42, ge=0, lt=2**32, description="Seed for new weights, row order and the validation split."
    )
    max_length: int = Field(
        default=1024,
        ge=8,
        le=1 << 20,
        description="Maximum number of tokens of a row; see `truncate`.",
    )
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="Longer context than the model was trained on, e.g. `{factor: 4}`; written into the saved config. "
        "The job measures perplexity by position before and after. Recipe sft. Left out: the model's own.",
    )
    turns: Literal["all", "last", "each"] = Field(
        default="all",
        description="Answers of a conversation to learn. all: every answer, in one row; last: the last answer, after "
        "the turns before it; each: one row for each answer, rendered as at inference. SFT only.",
    )
    reasoning: Literal["keep", "last", "drop"] = Field(
        default="keep",
        description="Reasoning in the assistant's messages. keep: as the data has it; last: only in the last answer; "
        "drop: none.",
    )
    special_tokens: Literal["text", "control"] = Field(
        default="text",
        description="Special tokens that are typed in a message, such as <|im_end|>. text: tokenised as plain text; "
        "control: they become the model's control tokens.",
    )
    truncate: Literal["right", "left", "drop", "refuse"] = Field(
        default="right",
        description="What to do with a row longer than `max_length`. right: cut its end; left: cut its beginning; "
        "drop: leave the row out; refuse: end the job.",
    )
    max_dropped: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Largest share of a data set's rows that may be left out because they are too long; beyond it the "
        "job ends.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1e6, description="Largest norm of the gradient; a larger one is scaled down. 0: never."
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Curve of the learning rate after the warm-up."
    )
    validation_split: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Share of the rows that is held out if there is no validation data set; 0: none.",
    )
    eval_before_training: bool = Field(
        default=True, description="Evaluate the untrained model first, so that the report can state the gain."
    )
    chat_template: Literal["chatml", "plain"] | None = Field(
        default=None, description="Chat template to use; left out: the model's own."
    )
    save_merged: bool = Field(default=False, description="Also save base plus adapter as one Hugging Face folder.")
    max_hours: float | None = Field(
        default=None,
        gt=0,
        le=8760,
        description="Hours of training, over all starts of the job, after which it stops, keeps its result and is "
        "`completed`; left out: no limit.",
    )
    autosave_minutes: float = Field(
        default=30.0,
        gt=0,
        le=10080,
        description="Minutes between checkpoints to resume from, in addition to the one after each epoch.",
    )
    keep_checkpoints: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Number of epoch checkpoints to keep: the last ones, plus the one with the lowest held-out loss.",
    )
    checkpoint_form: Literal["whole", "sharded"] = Field(
        default="whole",
        description="Form of the checkpoints. whole: rank 0 gathers and writes a model that can be used; sharded: "
        "each process writes its part, only to resume the job (strategy fsdp with `adapter` null). The "
        "result of a job is always whole.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Number of epochs in a row without a lower held-out loss after which training ends with the best "
        "epoch; left out: never.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use only operations that give the same result every time (torch.use_deterministic_algorithms), "
        "and kernels with fixed tile sizes instead of timed ones; an operation without such a form ends "
        "the job.",
    )
    dataloader_workers: int = Field(
        default=0, ge=0, le=64, description="Number of processes that prepare batches; 0: the training process does it."
    )


class DPOOptions(Options):
    """Options that only preference optimisation has."""

    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Share of labels assumed to be flipped; only for loss types sigmoid (cDPO), exo_pair (which needs "
        "> 0), robust, aot and aot_unpaired. 0: none.",
    )
    precompute_ref_log_probs: bool | None = Field(
        default=None,
        description="Compute the reference log-probabilities once, before training; left out: if there is more than "
        "one epoch.",
    )


class RLOptions(Options):
    """Options of recipes that generate."""

    # Not its end: after a cut end the model would go on with the prompt.
    truncate: Literal["left", "drop", "refuse"] = Field(
        default="drop",
        description="What to do with a prompt that leaves no room for an answer in `max_length`. left: cut its "
        "beginning; drop: leave the row out; refuse: end the job.",
    )


class TensorBoard(Block):
    """Event files in the job's folder: `trackers/tensorboard`."""


class Trackio(Block):
    """A SQLite file for trackio's dashboard: `trackers/trackio`, or TRACKIO_DIR in the server's `child_env`."""

    project: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Name of the project in trackio.")


class MLflow(Block):
    """A run in `trackers/mlflow/mlflow.db`, or at MLFLOW_TRACKING_URI in the server's `child_env`."""

    experiment: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Name of the experiment in MLflow.")


class WandB(Block):
    """A run in `trackers/wandb`, to sync by hand; with WANDB_API_KEY in the server's `child_secrets` it is sent."""

    project: str = Field(default="moe", pattern=PROJECT_PATTERN, description="Name of the project in Weights & Biases.")
    entity: str | None = Field(
        default=None,
        pattern=PROJECT_PATTERN,
        description="User or team that owns the project; left out: the default of the account.",
    )


class Trackers(Block):
    """The programs that get a job's figures besides its events. The server sets keys and addresses, never a job."""

    tensorboard: TensorBoard | None = Field(
        default=None, description="Settings for TensorBoard; `{}` writes figures for it, left out: nothing is written."
    )
    trackio: Trackio | None = Field(
        default=None, description="Settings for trackio; `{}` writes figures for it, left out: nothing is written."
    )
    mlflow: MLflow | None = Field(
        default=None, description="Settings for MLflow; `{}` writes figures for it, left out: nothing is written."
    )
    wandb: WandB | None = Field(
        default=None,
        description="Settings for Weights & Biases; `{}` writes figures for it, left out: nothing is written.",
    )
