"""The `distill` block: train toward another model's probabilities as well as toward the rows."""

from typing import TYPE_CHECKING

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec import SFTSpec


class Distill(Block):
    """Knowledge distillation (arXiv 1503.02531): (1 - weight) * CE + weight * temperature^2 * KL(teacher || model)."""

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Teacher, with this model's tokenizer and vocabulary: a folder, name of a job, or hub id; such as "
        "the model before a surgery. Left out: this job's model as it was, which takes no more memory with LoRA, and a "
        "second copy without.",
    )
    weight: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the teacher's term in the loss; 1: the rows' own answers do not count, only the "
        "teacher's probabilities at them.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.1,
        le=100,
        description="What the logits of both models are divided by before their probabilities are compared; above 1, "
        "unlikely tokens count more.",
    )


def check_distill(job: "SFTSpec") -> None:
    """Raise if a job distils, and another setting would spoil or ignore that.

    Raises:
        ValueError: naming both settings.
    """
    asked = job.distill
    if asked is None:
        return
    if job.data.packed:
        raise ValueError("distill: is not valid with data.packed true, where teacher and model would have to keep the "
                         "rows of a sequence apart in the same way; expected false")  # fmt: skip
    if asked.model is not None:
        return
    adapter = job.adapter
    if asked.weight == 1 and (adapter is None or adapter.init_from is None):
        raise ValueError("distill.weight: 1.0 is not valid without distill.model: the model begins as its own teacher, "
                         "and nothing would change; expected less than 1, or another teacher")  # fmt: skip
    if adapter is None:
        return
    # The teacher is the model with its adapter off, so what changes the model's routing would change both.
    if job.moe.moe_load_balancing in ("expert_choice", "aux_free"):
        raise ValueError(f"distill: is not valid with moe.moe_load_balancing {job.moe.moe_load_balancing!r}, which "
                         "would change the teacher too; expected 'switch' or 'gshard', or distill.model")  # fmt: skip
    for name in ("expert_dropout", "router_jitter"):
        if getattr(job.moe, name) > 0:
            raise ValueError(f"distill: is not valid with moe.{name}, which would change the teacher too; expected 0, "
                             "or distill.model")  # fmt: skip
