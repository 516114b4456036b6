"""What a job whose processes share its model out (`resources.strategy`) may not ask for, each with its reason."""

from typing import Any

from llama_stack_provider_moe.spec.options import DPOOptions


def refuse_beside_sharding(job: Any) -> None:
    """Raise where a job's base is to be shared out and something else of it needs the base whole.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming both settings.
    """
    if not job.resources.sharded:
        return
    adapter, options = job.adapter, job.options
    ahead = isinstance(options, DPOOptions) and (
        options.precompute_ref_log_probs is True or job.moe.moe_load_balancing == "aux_free"
    )
    against = {
        "training.dtype 'fp16' with adapter null, for whose gradients there is no scaling": adapter is None
        and job.training.dtype == "fp16",
        "adapter.quantize_base true, whose codes are not shared out": adapter is not None and adapter.quantize_base,
        "adapter.use_dora true, which reads the base's weights": adapter is not None and adapter.use_dora,
        "adapter.apply_lora_to_output true": adapter is not None and adapter.apply_lora_to_output,
        "options.save_merged true; merge on disk instead (moe-train export merge)": options.save_merged,
        "a reference computed ahead (options.precompute_ref_log_probs, or aux_free), for TRL reads all weights": ahead,
        "an eval block, which one process runs alone": job.eval is not None,
    }
    problems = [what for what, holds in against.items() if holds]
    if problems:
        raise ValueError(
            f"resources.strategy: {job.resources.strategy!r} is not valid with {'; nor with '.join(problems)}"
        )
