"""The rewards of a job: graders with weights, for all prompts or for one class of them, and how they run."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.grader_base import MOST_GRADERS, VARIABLE_NAME_PATTERN
from llama_stack_provider_moe.spec.graders import Grader

PromptClass = Literal["refuse", "help"]
PROMPT_CLASSES: tuple[PromptClass, ...] = ("refuse", "help")


class Reward(Block):
    """A grader, its weight, and the prompts that it is for."""

    grader: Grader = Field(description="Grader, an object with `type` and `name`.")
    weight: float = Field(
        default=1.0, ge=-1000, le=1000, description="Weight in the sum of rewards; negative: what it finds is bad."
    )
    prompts: PromptClass | None = Field(
        default=None,
        description="Class of prompts that it grades, by the row's column `class`. refuse: prompts to refuse; help: "
        "prompts to answer. Other rows get no value of it. Left out: all prompts.",
    )


class Grading(Block):
    """How graders run, and how many may fail."""

    deadline_s: float = Field(
        default=10.0, ge=0.1, le=600, description="Seconds for one answer and grader; then it is stopped."
    )
    memory_mb: int = Field(
        default=1024, ge=256, le=65_536, description="Memory of each process that grades, in MB; more ends it."
    )
    processes: int = Field(default=2, ge=1, le=32, description="Processes without torch that grade side by side.")
    retries: int = Field(
        default=1, ge=0, le=5, description="Further tries after a grader was stopped, ended or did not answer."
    )
    max_failed_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of rows without a value of a grader above which the job fails."
    )
    failed_window: int = Field(
        default=256, ge=1, le=1_000_000, description="Last rows over which `max_failed_share` is taken."
    )
    class_column: str = Field(
        default="class", pattern=VARIABLE_NAME_PATTERN, description="Column with a prompt's class: refuse or help."
    )


def _together(rewards: list[Reward]) -> list[Reward]:
    names = [each.grader.name for each in rewards]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{number}.grader.name: {name!r} is named twice; expected different names")
    for number, each in enumerate(rewards):
        if each.weight == 0:
            raise ValueError(f"{number}.weight: 0 has no effect; expected another number")
    classes = {each.prompts for each in rewards} - {None}
    if len(classes) == 1:
        (found,) = classes
        (other,) = set(PROMPT_CLASSES) - classes
        learnt = "refuse everything" if found == "refuse" else "help with everything"
        raise ValueError(f"rewards with `prompts` are all for {found!r}; expected also one for {other!r}, else the "
                         f"model learns to {learnt}")  # fmt: skip
    return rewards


Rewards = Annotated[list[Reward], Field(min_length=1, max_length=MOST_GRADERS), AfterValidator(_together)]
REWARDS: TypeAdapter[list[Reward]] = TypeAdapter(Rewards)


def are_by_class(rewards: list[Reward]) -> bool:
    """Return whether rows need a class."""
    return any(each.prompts is not None for each in rewards)
