"""How long a job would train on this machine's GPU, from the operations of a token and the GPU's peak."""

import torch

from llama_stack_provider_moe.compute.planning.planner import Planner, changed
from llama_stack_provider_moe.compute.planning.throughput import count_flops, peak_flops
from llama_stack_provider_moe.spec import BreakerSpec, GRPOSpec, KTOSpec, RewardSpec, SFTSpec, TrainingSpec
from llama_stack_provider_moe.spec.row_sources import PAIRED
from llama_stack_provider_moe.spec.run_time import RunTime, rows_in_run, run_time, unknown_time

# Share of the peak that a step is assumed to reach. No GPU was measured: an assumption, which the answer names.
UTILISATION = 0.2


def device_name(spec: TrainingSpec) -> str | None:
    """CUDA's name of the GPU that a job would use on this machine; None for a job on the CPU, or without a GPU."""
    if spec.resources.gpus == 0 or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0)


def flops_a_token(planner: Planner, spec: TrainingSpec) -> float:
    """Operations of one token in a row of full length; see `throughput`.

    Args:
        planner: has the model's config.
        spec: the job. A base in 8 or 4 bits counts as in 16, because the products are the same.
    """
    if spec.adapter is not None and spec.adapter.quantize_base:
        # With all that is valid only beside it.
        spec = changed(spec, {"adapter.quantize_base": False, "adapter.quantize_bits": 4,
                              "adapter.quantize_scales": False, "efficiency.offload_experts": False})  # fmt: skip
    adapted = planner.adapted(spec)
    distils = isinstance(spec, SFTSpec) and spec.distill is not None  # by another model: as if it were as large
    penalised = isinstance(spec, GRPOSpec) and spec.rl.beta > 0
    references = int(spec.recipe == "dpo" or isinstance(spec, BreakerSpec) or distils or penalised)
    if isinstance(spec, KTOSpec):
        references = 3  # both models also run over mismatched answers
    step = count_flops(adapted.model, adapted.layout, references, head=not isinstance(spec, RewardSpec))
    return step.of([spec.options.max_length]) / spec.options.max_length


def estimated(planner: Planner, spec: TrainingSpec, device: str | None, rows: int | None = None) -> RunTime:
    """Return the time that a job would take, at `UTILISATION` of the peak of its devices.

    Args:
        planner: has the model's config.
        spec: the job.
        device: CUDA's name of its devices; None: a CPU, or no device that is known.
        rows: of a whole epoch; None if unknown.
    """
    if device is None:
        return unknown_time("no job like it was measured, and the peak of a CPU or an absent GPU is not known")
    peak = peak_flops(device, spec.training.dtype)
    if peak is None:
        in_dtype = f"{device} in {spec.training.dtype}"
        return unknown_time(f"no job like it was measured, and the peak of {in_dtype} is not known")
    speed = UTILISATION * peak * spec.resources.ranks / flops_a_token(planner, spec)
    pair = 2 if spec.recipe in PAIRED else 1
    basis = (
        f"estimated from the operations of a token, at {UTILISATION:.0%} of the peak of {device}, with every row as "
        f"long as {spec.options.max_length:,} tokens"
    )
    return run_time(speed, rows_in_run(spec, rows), pair * spec.options.max_length, "estimated", basis)
