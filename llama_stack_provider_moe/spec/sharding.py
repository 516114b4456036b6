"""What a job whose processes share its model out (`resources.strategy`) may not ask for, each with its reason."""

from typing import Any

from llama_stack_provider_moe.spec.options import DPOOptions


def refuse_beside_sharding(job: Any) -> None:
    """Raise where a job's base, or its experts, are to be shared out and something else of it needs them whole.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming both settings.
    """
    strategy, adapter = job.resources.strategy, job.adapter
    if job.options.checkpoint_form == "sharded" and (strategy != "fsdp" or adapter is not None):
        raise ValueError("options.checkpoint_form: 'sharded' is not valid here; expected 'whole', or strategy 'fsdp' "
                         "(resources) with adapter null, where processes have parts of what trains")  # fmt: skip
    if job.resources.cpu_offload and (strategy != "fsdp" or adapter is not None or job.resources.gpus == 0):
        raise ValueError("resources.cpu_offload: true is not valid here; expected false, or strategy 'fsdp', GPUs and "
                         "adapter null: of a frozen base and on the CPU there is nothing to be gained")  # fmt: skip
    if not job.resources.sharded:
        return
    against = {
        "adapter.quantize_base true, whose codes are not shared out": adapter is not None and adapter.quantize_base,
        "adapter.use_dora true, which reads the base's weights": adapter is not None and adapter.use_dora,
        "options.save_merged true; merge on disk instead (moe-train export merge)": job.options.save_merged,
        "a reference computed ahead (options.precompute_ref_log_probs, or aux_free), for TRL reads all weights": (
            _reference_ahead(job)
        ),
        "an eval block, which one process runs alone": job.eval is not None,
        **(_against_fsdp(job) if strategy == "fsdp" else _against_ep(job)),
    }
    problems = [what for what, holds in against.items() if holds]
    if problems:
        raise ValueError(f"resources.strategy: {strategy!r} is not valid with {'; nor with '.join(problems)}")


def _reference_ahead(job: Any) -> bool:
    return isinstance(job.options, DPOOptions) and (
        job.options.precompute_ref_log_probs is True or job.moe.moe_load_balancing == "aux_free"
    )


def _against_fsdp(job: Any) -> dict[str, bool]:
    return {
        "adapter.apply_lora_to_output true": job.adapter is not None and job.adapter.apply_lora_to_output,
    }


def _against_ep(job: Any) -> dict[str, bool]:
    return {
        "training.dtype 'fp16', whose steps are left out by each process for itself": job.training.dtype == "fp16",
        "moe.enable_moe_optimizations false: the model's own experts send no tokens": (
            not job.moe.enable_moe_optimizations
        ),
        "moe.experts_backend 'peft', likewise": job.moe.experts_backend == "peft",
        "moe.moe_load_balancing 'expert_choice'": job.moe.moe_load_balancing == "expert_choice",
    }
