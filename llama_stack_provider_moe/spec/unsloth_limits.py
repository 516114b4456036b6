"""Settings that are not valid with `loader: unsloth`, each with its reason; none is ignored silently."""

from typing import TYPE_CHECKING, Literal

from llama_stack_provider_moe.spec.adapter import Adapter
from llama_stack_provider_moe.spec.moe import Moe

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec import TrainingJob

Loader = Literal["hf", "unsloth"]

# Values of the `moe` block that are valid beside the defaults, because they ask for what Unsloth does anyway.
_AS_IT_IS: dict[str, object] = {"output_router_logits": False, "router_aux_loss_coef": 0, "train_router": False}


def refuse_beside_unsloth(job: "TrainingJob") -> None:
    """Raise if Unsloth is to load the model and the job has a setting that does not work with it.

    Args:
        job: a job that trains.

    Raises:
        ValueError: naming each setting.
    """
    if job.loader != "unsloth":
        return
    problems = [what for what, holds in _against(job).items() if holds]
    problems += [f"moe.{name}; Unsloth's own code runs the experts, without load balancing, and routers stay frozen"
                 for name in Moe.model_fields if _differs(job.moe, name)]  # fmt: skip
    if problems:
        raise ValueError(f"loader: 'unsloth' is not valid with {'; nor with '.join(problems)}")


def _against(job: "TrainingJob") -> dict[str, bool]:
    adapter, options, resources = job.adapter, job.options, job.resources
    breaker = getattr(job, "circuit_breaker", None)
    return {
        "resources of more than one process": resources.ranks > 1,
        "resources.gpus 0; it needs a GPU": resources.gpus == 0,
        **({"adapter null (all weights train)": True} if adapter is None else _against_adapter(adapter)),
        "data.packed true, because its attention may mix the rows": job.data.packed,
        "circuit_breaker.variant 'repbend'": breaker is not None and breaker.variant == "repbend",
        "options.rope_scaling, because it scales rotary embeddings itself": options.rope_scaling is not None,
        "options.deterministic true, because its kernels are not deterministic": options.deterministic,
        "options.save_merged true; merge on disk instead (moe-train export merge)": options.save_merged,
        "an eval block": job.eval is not None,
        "a distill block": getattr(job, "distill", None) is not None,
        "an export block, whose load check compares with transformers' arithmetic": job.export is not None,
    }


def _against_adapter(adapter: Adapter) -> dict[str, bool]:
    return {
        "adapter.init_from": adapter.init_from is not None,
        "adapter.plan 'per_expert'": adapter.plan == "per_expert",
        "adapter.alphas": bool(adapter.alphas),
        "adapter.use_dora true": adapter.use_dora,
        "adapter.apply_lora_to_output true, which it turns into a whole new head": adapter.apply_lora_to_output,
        "adapter.quantize_bits 8": adapter.quantize_bits != 4,
        "adapter.quantize_scales true, because it always quantises the scales of 4 bits itself": (
            adapter.quantize_scales
        ),
        "adapter.dtype 'bf16'; it adds LoRA in fp32": adapter.dtype != "fp32",
    }


def _differs(moe: Moe, name: str) -> bool:
    value = getattr(moe, name)
    if value == Moe.model_fields[name].default:
        return False
    return name not in _AS_IT_IS or value != _AS_IT_IS[name]
