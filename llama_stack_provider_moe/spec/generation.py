"""What recipes that learn from the model's own answers have in common: how they are written, and what can't be."""

from typing import TYPE_CHECKING

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec.training_jobs import TrainingJob

_WHY_BALANCING = {
    "expert_choice": "whose experts choose among the tokens of a batch, so that a model would generate with one router "
    "and learn with another",
    "aux_free": "which moves the routers' biases between generating an answer and learning from it",
}


class Generation(Block):
    """How the model writes the answers that it learns from."""

    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature of the answers.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus: least share of probability to sample from.")
    max_completion_length: int = Field(
        default=256,
        ge=1,
        le=1 << 16,
        description="Largest number of tokens of an answer; a prompt has what is left of `options.max_length`.",
    )
    keep_samples: int = Field(
        default=512,
        ge=0,
        le=100_000,
        description="Newest answers that the job keeps in its folder, with rewards if it has graders; 0: none.",
    )


def refuse_no_room(job: "TrainingJob", block: str, generation: Generation) -> None:
    """Raise if answers leave prompts no room.

    Args:
        job: the job.
        block: name of its block that says how answers are written.
        generation: that block.

    Raises:
        ValueError: naming the setting.
    """
    if generation.max_completion_length >= job.options.max_length:
        most = generation.max_completion_length
        raise ValueError(f"{block}.max_completion_length: {most} is not valid; expected less than options.max_length, "
                         f"{job.options.max_length}, which has the prompt too")  # fmt: skip


def refuse_moving_routers(job: "TrainingJob", recipe: str) -> None:
    """Raise if the model would route otherwise when it learns from an answer than when it wrote it.

    Args:
        job: the job.
        recipe: its name.

    Raises:
        ValueError: naming the setting.
    """
    balancing = job.moe.moe_load_balancing
    if balancing in _WHY_BALANCING:
        raise ValueError(f"moe.moe_load_balancing: {balancing!r} is not valid with recipe {recipe!r}, "
                         f"{_WHY_BALANCING[balancing]}; expected 'switch' or 'gshard'")  # fmt: skip


def least_rows(job: "TrainingJob", prompts: int, product: str) -> tuple[int, str]:
    """Fewest rows of which those that are not held out fill one generation, and why, for the text of an error.

    Args:
        job: the job.
        prompts: of one generation.
        product: how that number comes about.
    """
    share = 0.0 if job.data.has_validation_sets else job.options.validation_split
    least = prompts if share == 0 else max(2, int(prompts / (1 - share)) - 1)
    while least - held_out_of(least, share) < prompts:
        least += 1
    held = held_out_of(least, share)
    why = f"at least {least:,} rows: {prompts:,} fill one generation ({product})"
    return least, why + (f", and {held:,} are held out (options.validation_split {share:g})" if held else "")


def held_out_of(rows: int, share: float) -> int:
    """Number of the rows that `options.validation_split` holds out: at least one of two."""
    return 0 if share == 0 or rows < 2 else max(1, round(rows * share))
