"""The parts of a model that compute beside its routed experts: shared experts, and dense MLPs."""

import re

from torch import nn
from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.moe.experts_modules import FoundExperts
from llama_stack_provider_moe.compute.moe.layout import bare, find_module, join
from llama_stack_provider_moe.errors import LayoutError

_SHARED_COUNT = re.compile(r"(moe_)?(n|num)_shared_experts?")
_MLP = re.compile(r"mlps?|feed_forward|ffn|\w*shared\w*")


def parallel_parts(
    model: nn.Module, experts: FoundExperts, dense: tuple[int, ...]
) -> tuple[str | None, tuple[str, ...]]:
    """Path below a layer of the shared experts, and full names of the dense MLPs, in any layer."""
    shared: set[str] = set()
    mlps: list[str] = []
    for layer in [*sorted(experts.modules), *dense]:
        root = join(experts.layers_path, str(layer))
        paths = [""] if layer in dense or not experts.block else ["", *_above(experts.block)]
        for path in paths:
            for name, child in bare(find_module(model, join(root, path))).named_children():
                below = join(path, name)
                has_experts = layer in experts.modules
                if not _is_mlp(name, bare(child)) or (has_experts and f"{experts.path}.".startswith(f"{below}.")):
                    continue
                if has_experts and "shared" in name:
                    shared.add(below)
                else:
                    mlps.append(join(root, below))
    if len(shared) > 1:
        raise LayoutError(f"expected one module of shared experts in a layer, found {', '.join(sorted(shared))}")
    return (shared.pop() if shared else None), tuple(mlps)


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: at + 1]) for at in range(len(parts))]


def _is_mlp(name: str, module: nn.Module) -> bool:
    """Whether a module is an MLP: at least two matrices in linear layers, and a name or an activation to match."""
    linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
    stacked = any(parameter.dim() == 3 and "lora_" not in path for path, parameter in module.named_parameters())
    named = re.fullmatch(_MLP, name) is not None
    alone = {type(each) for each in module.children()}
    activated = name == "mixer" and hasattr(module, "act_fn") and not hasattr(module, "conv1d")
    return len(linear) >= 2 and not stacked and (named or activated) and bool(alone)


def shared_count(config: PreTrainedConfig) -> int:
    counts = [value for key, value in config.to_dict().items() if _SHARED_COUNT.fullmatch(key) and type(value) is int]
    return counts[0] if counts else 1
