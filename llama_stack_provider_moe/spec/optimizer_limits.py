"""Optimisers and data types of an adapter that are not valid beside other settings, each with its reason."""

from typing import TYPE_CHECKING

from llama_stack_provider_moe.spec.blocks import OF_BITSANDBYTES, PAGED

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec import TrainingJob


def refuse_beside_optimizer(job: "TrainingJob") -> None:
    """Raise if a job's optimiser can't run where the job does, or can't train an adapter in bf16.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming both settings.
    """
    kind, adapter = job.optimizer.optimizer_type, job.adapter
    if kind in PAGED and job.resources.gpus == 0:
        raise ValueError(f"optimizer.optimizer_type: {kind!r} is not valid with resources.gpus 0; expected "
                         f"{instead_of_paged(kind)!r}: paged memory is CUDA's, and on a CPU bitsandbytes would only "
                         "warn and not page")  # fmt: skip
    if adapter is None or adapter.dtype == "fp32":
        return
    if job.training.dtype != "bf16":
        raise ValueError(f"adapter.dtype: 'bf16' is not valid with training.dtype {job.training.dtype!r}; expected "
                         "'fp32', or training.dtype 'bf16'")  # fmt: skip
    if kind not in OF_BITSANDBYTES:
        expected = ", ".join(map(repr, OF_BITSANDBYTES))
        raise ValueError(f"adapter.dtype: 'bf16' is not valid with optimizer.optimizer_type {kind!r}, which would keep "
                         "moments in bf16, where the second one never falls, and lose small steps; expected 'fp32', "
                         f"or one of {expected}")  # fmt: skip
    if any(rule.lr_multiplier != 1 for rule in adapter.rules):
        raise ValueError("adapter.dtype: 'bf16' is not valid with an lr_multiplier in adapter.rules, which scales "
                         "steps that are rounded already; expected 'fp32'")  # fmt: skip


def instead_of_paged(kind: str) -> str:
    """The optimiser that does the same without paged memory."""
    return {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}[kind]
