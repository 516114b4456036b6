"""Settings that are not valid if processes divide the model among them (`resources.strategy`), each with its reason."""

from typing import TYPE_CHECKING

from llama_stack_provider_moe.spec.blocks import OF_BITSANDBYTES
from llama_stack_provider_moe.spec.options import DPOOptions, RLOptions

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec import TrainingJob


def refuse_beside_sharding(job: "TrainingJob") -> None:
    """Raise if a job divides its model among processes, but another setting needs the whole model.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming both settings.
    """
    strategy, adapter = job.resources.strategy, job.adapter
    if job.options.checkpoint_form == "sharded" and (strategy != "fsdp" or adapter is not None):
        raise ValueError("options.checkpoint_form: 'sharded' is not valid here; expected 'whole', or "
                         "resources.strategy 'fsdp' with adapter null, which divides the trained weights")  # fmt: skip
    if job.resources.cpu_offload and (strategy != "fsdp" or adapter is not None or job.resources.gpus == 0):
        raise ValueError("resources.cpu_offload: true is not valid here; expected false, or strategy 'fsdp', GPUs and "
                         "adapter null: with a frozen base or on the CPU it saves nothing")  # fmt: skip
    if not job.resources.sharded:
        return
    against = {
        "efficiency.offload_experts true, whose experts can't be divided": job.efficiency.offload_experts,
        "adapter.quantize_base true, whose codes can't be divided": adapter is not None and adapter.quantize_base,
        f"optimizer.optimizer_type {job.optimizer.optimizer_type!r}, whose state can't be divided": (
            job.optimizer.optimizer_type in OF_BITSANDBYTES
        ),
        "adapter.use_dora true, which reads the whole weights of the base": adapter is not None and adapter.use_dora,
        "options.save_merged true; merge on disk instead (moe-train export merge)": job.options.save_merged,
        "a precomputed reference (options.precompute_ref_log_probs, or aux_free), for which TRL reads all weights": (
            _reference_ahead(job)
        ),
        "an eval block, which a single process runs": job.eval is not None,
        f"recipe {getattr(job, 'recipe', None)!r}, whose processes write answers of unequal lengths, while a divided "
        "model needs all of them in every pass (expected 'ddp')": isinstance(job.options, RLOptions),
        "a distill block, whose teacher is not divided": getattr(job, "distill", None) is not None,
        **(_against_fsdp(job) if strategy == "fsdp" else _against_ep(job)),
    }
    problems = [what for what, holds in against.items() if holds]
    if problems:
        raise ValueError(f"resources.strategy: {strategy!r} is not valid with {'; nor with '.join(problems)}")


def refuse_beside_offload(job: "TrainingJob") -> None:
    """Raise if a job offloads experts, but another setting needs them elsewhere.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming each setting.
    """
    if not job.efficiency.offload_experts:
        return
    against = {
        "adapter null, which trains the experts": job.adapter is None,
        "adapter.quantize_base false; expected true: what is offloaded is codes": (
            job.adapter is not None and not job.adapter.quantize_base
        ),
        "loader 'unsloth', which holds the experts itself": job.loader == "unsloth",
    }
    problems = [what for what, holds in against.items() if holds]
    if problems:
        raise ValueError(f"efficiency.offload_experts: true is not valid with {'; nor with '.join(problems)}")


def _reference_ahead(job: "TrainingJob") -> bool:
    return isinstance(job.options, DPOOptions) and (
        job.options.precompute_ref_log_probs is True or job.moe.moe_load_balancing == "aux_free"
    )


def _against_fsdp(job: "TrainingJob") -> dict[str, bool]:
    return {
        "adapter.apply_lora_to_output true": job.adapter is not None and job.adapter.apply_lora_to_output,
    }


def _against_ep(job: "TrainingJob") -> dict[str, bool]:
    return {
        "training.dtype 'fp16', where each process alone decides which steps to skip": job.training.dtype == "fp16",
        "moe.enable_moe_optimizations false: the model's own code does not send tokens between processes": (
            not job.moe.enable_moe_optimizations
        ),
        "moe.experts_backend 'peft', for the same reason": job.moe.experts_backend == "peft",
        "moe.moe_load_balancing 'expert_choice'": job.moe.moe_load_balancing == "expert_choice",
    }
