"""The job that distils on the model's own answers; the `distill` block of SFT distils on the rows' answers."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.generation import Generation, least_rows, refuse_moving_routers, refuse_no_room
from llama_stack_provider_moe.spec.options import RLOptions
from llama_stack_provider_moe.spec.preference_jobs import refuse_what_is_for_sft
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.training_jobs import TrainingJob


class DistillSpec(TrainingJob):
    """On-policy distillation (arXiv 2306.13649): the model's answers, a teacher's probabilities."""

    generating_block: ClassVar[str] = "generation"  # name of the block that says how answers are written

    recipe: Literal["distill"] = Field(
        description="On-policy distillation: the model writes answers, and learns a teacher's probabilities at them."
    )
    teacher: str = Field(
        min_length=1,
        max_length=1024,
        description="Model to learn from, with this model's tokenizer and vocabulary: a folder, name of a job, or hub "
        "id; such as the model before a surgery.",
    )
    beta: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Divergence from the teacher. 0: KL(teacher || model); 1: KL(model || teacher), which weighs what "
        "the model itself says; between: the generalized Jensen-Shannon divergence, from a mixture with this share of "
        "the teacher.",
    )
    generation: Generation = Field(
        default_factory=Generation,
        description="How the model writes answers; both models' logits are divided by its temperature too.",
    )
    options: RLOptions = Field(default_factory=RLOptions)

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "DistillSpec":
        refuse_what_is_for_sft(self, self.recipe, "the model learns from answers that it writes itself")
        refuse_no_room(self, self.generating_block, self.generation)
        refuse_moving_routers(self, self.recipe)
        return self

    @property
    def generating(self) -> Generation:
        """How answers are written."""
        return self.generation

    def teacher_named(self) -> tuple[str, str] | None:
        """The field that names the teacher, and its value."""
        return "teacher", self.teacher

    def with_teacher(self, model: str) -> dict[str, object]:
        """The fields of the job with another name of the teacher."""
        return {"teacher": model}

    def row_sources(self) -> list[RowSource]:
        """The prompts, and the held-out ones."""
        training = self.training
        product = f"training.batch_size {training.batch_size} x gradient_accumulation_steps "
        product += f"{training.gradient_accumulation_steps} x processes {self.resources.ranks}"
        prompts = training.batch_size * training.gradient_accumulation_steps * self.resources.ranks
        least, why = least_rows(self, prompts, product)
        found = []
        for source in super().row_sources():
            if source.part in ("train", "validation"):
                source = source._replace(answered=False)
            if source.part == "train":
                source = source._replace(least=least, why_least=why)
            found.append(source)
        return found
