"""What a job may not ask for beside `loader: unsloth`, each with its reason: nothing of it is passed over."""

from typing import Any, Literal

from llama_stack_provider_moe.spec.moe import Moe

Loader = Literal["hf", "unsloth"]

# Of the `moe` block: what may be said beside the defaults, because it asks for what happens anyway.
_AS_IT_IS: dict[str, object] = {"output_router_logits": False, "router_aux_loss_coef": 0, "train_router": False}


def refuse_beside_unsloth(job: Any) -> None:
    """Raise where Unsloth is to load the model, and the job asks for something that is not done with it.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming each setting.
    """
    if job.loader != "unsloth":
        return
    problems = [what for what, holds in _against(job).items() if holds]
    problems += [f"moe.{name}; Unsloth's own experts run, routers are frozen and no balance is kept"
                 for name in Moe.model_fields if _differs(job.moe, name)]  # fmt: skip
    if problems:
        raise ValueError(f"loader: 'unsloth' is not valid with {'; nor with '.join(problems)}")


def _against(job: Any) -> dict[str, bool]:
    adapter, options, resources = job.adapter, job.options, job.resources
    breaker = getattr(job, "circuit_breaker", None)
    has = adapter is not None
    return {
        "resources of more than one process": resources.ranks > 1,
        "resources.gpus 0; it needs a GPU": resources.gpus == 0,
        "adapter null: all weights train": not has,
        "adapter.plan 'per_expert'": has and adapter.plan == "per_expert",
        "adapter.alphas": has and bool(adapter.alphas),
        "adapter.use_dora true": has and adapter.use_dora,
        "adapter.apply_lora_to_output true, of which it makes a whole new head": has and adapter.apply_lora_to_output,
        "adapter.quantize_bits 8": has and adapter.quantize_bits != 4,
        "data.packed true, whose rows its attention is not known to keep apart": job.data.packed,
        "circuit_breaker.variant 'repbend'": breaker is not None and breaker.variant == "repbend",
        "options.deterministic true, which its kernels are not": options.deterministic,
        "options.save_merged true; merge on disk instead (moe-train export merge)": options.save_merged,
        "an eval block": job.eval is not None,
        "an export block, whose load check compares with transformers' arithmetic": job.export is not None,
    }


def _differs(moe: Moe, name: str) -> bool:
    value = getattr(moe, name)
    if value == Moe.model_fields[name].default:
        return False
    return name not in _AS_IT_IS or value != _AS_IT_IS[name]
