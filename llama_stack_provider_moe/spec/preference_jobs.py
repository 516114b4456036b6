"""The jobs that learn from judgements of answers, beside DPO: KTO."""

from typing import Literal

from pydantic import Field, model_validator

from llama_stack_provider_moe.spec.options import Options
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.training_jobs import TrainingJob

_MOVING = ("aux_free", "expert_choice")


def refuse_what_is_for_sft(job: TrainingJob, recipe: str, why: str) -> None:
    """Raise if a job has a setting that only SFT (or DPO) reads.

    Args:
        job: of another recipe.
        recipe: its name.
        why: what the recipe does instead, for the error.

    Raises:
        ValueError: naming the setting.
    """
    only = {
        "data.packed: true is": job.data.packed,
        "data.train_on_input: true is": job.data.train_on_input,
        f"options.turns: {job.options.turns!r} is": job.options.turns != "all",
        "moe.expert_dropout: is": job.moe.expert_dropout > 0,
        "moe.router_jitter: is": job.moe.router_jitter > 0,
    }
    for name, asked in only.items():
        if asked:
            raise ValueError(f"{name} for SFT only; {why}")
    for name in ("domains", "domain_column"):
        if getattr(job.data, name) is not None:
            raise ValueError(f"data.{name}: is for SFT and DPO; {why}")
    if job.loader == "unsloth":
        raise ValueError(f"loader: 'unsloth' is not valid with recipe {recipe!r}; expected 'hf'")


class KTOSpec(TrainingJob):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    recipe: Literal["kto"] = Field(description="Kahneman-Tversky optimisation: answers with a thumb up or down.")
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Weight of the penalty that keeps the model near the reference model; larger stays nearer.",
    )
    desirable_weight: float = Field(
        default=1.0, gt=0, le=1000, description="Weight of the loss of answers with a thumb up."
    )
    undesirable_weight: float = Field(
        default=1.0, gt=0, le=1000, description="Weight of the loss of answers with a thumb down."
    )
    options: Options = Field(default_factory=Options)

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "KTOSpec":
        refuse_what_is_for_sft(self, self.recipe, "KTO weighs the answer of each row against the reference")
        if self.training.batch_size < 2:
            raise ValueError("training.batch_size: 1 is not valid with recipe 'kto'; expected 2 or more: the KL term "
                             "is of each prompt with the answer to another prompt of its micro-batch")  # fmt: skip
        if self.resources.ranks > 1:
            raise ValueError(f"resources: {self.resources.ranks} processes are not valid with recipe 'kto'; expected "
                             "1, because the KL term is over one micro-batch")  # fmt: skip
        if self.moe.moe_load_balancing in _MOVING:
            raise ValueError(f"moe.moe_load_balancing: {self.moe.moe_load_balancing!r} is not valid with recipe 'kto', "
                             "whose reference routes as the base does; expected 'switch' or 'gshard'")  # fmt: skip
        return self

    def with_kl(self, rows: int) -> int:
        """Rows of an epoch of `rows`: one fewer where the last micro-batch would have one row, and so no KL term."""
        return rows - (rows % self.training.batch_size == 1)

    def row_sources(self) -> list[RowSource]:
        """The rows, of which each data set needs some of both classes."""
        split = self.data.validation_dataset_id is None and self.options.validation_split > 0
        least = {"train": 2 if split else 1, "validation": 1}
        return [
            source._replace(least_of_class=least[source.part]) if source.part in least else source
            for source in super().row_sources()
        ]
