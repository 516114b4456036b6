"""Compare a model with what its config describes, and refuse signs of experts that were not understood.

The config is the intent: the model that it describes is built on no device, and a difference is an error.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.exceptions import OF_IMAGES
from llama_stack_provider_moe.compute.moe.experts_modules import FoundExperts, is_experts
from llama_stack_provider_moe.compute.moe.layout import (
    DOWN,
    GATE_UP,
    UP,
    ExpertLayout,
    bare_name,
    join,
    layer_ranges,
    text_config,
)
from llama_stack_provider_moe.errors import LayoutError


def original_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of a model that FSDP2 may have given a class of its own."""
    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def described_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model as its config describes it, on no device."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        return original_class(model)._from_config(config)


def compare_layers(config: PreTrainedConfig, found: FoundExperts | None, described: FoundExperts | None) -> None:
    here = sorted(found.modules) if found else []
    there = sorted(described.modules) if described else []
    if here != there:
        raise LayoutError(
            f"{config.model_type}: the config puts experts in layers {layer_ranges(there)}, "
            f"the modules have them in layers {layer_ranges(here)}"
        )


_Shapes = dict[str, tuple[int, ...]]


def stack_shapes(experts: FoundExperts) -> _Shapes:
    """Shapes of the experts' own parameters, by their full names."""
    return {
        join(experts.layers_path, str(layer), experts.path, name): tuple(parameter.shape)
        for layer, module in experts.modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def compare_shapes(config: PreTrainedConfig, here: _Shapes, there: _Shapes) -> None:
    for name in [*there, *(name for name in here if name not in there)]:
        if here.get(name) != there.get(name):
            raise LayoutError(
                f"{config.model_type}: {name} has shape {here.get(name)}, the config describes {there.get(name)}"
            )


def compare_beside(model: nn.Module, described: nn.Module, layout: ExpertLayout) -> None:
    """Compare routers and shared experts with those of the model that the config describes."""
    routers = tuple(f"{layout.path(layer, layout.router_path)}." for layer in layout.moe_layers)
    shapes, meant = ({bare_name(name): tuple(parameter.shape) for name, parameter in each.named_parameters()
                      if bare_name(name).startswith(routers) and "lora_" not in name}
                     for each in (model, described))  # fmt: skip
    compare_shapes(text_config(model), shapes, meant)
    for layer in layout.moe_layers if layout.shared_path else ():
        path = layout.path(layer, str(layout.shared_path))
        if not any(name == path for name, _ in described.named_modules()):
            raise LayoutError(f"{layout.model_type}: {path} is in the model, and not in what its config describes")


def mentions_experts(config: PreTrainedConfig) -> bool:
    return any("experts" in key and type(value) is int and value > 1 for key, value in config.to_dict().items())


def refuse_signs(model: nn.Module, config: PreTrainedConfig, layers_path: str) -> None:
    """Raise if a model shows signs of experts beside those that were found, in the decoder layers at `layers_path`."""
    keys = {
        key: value
        for key, value in config.to_dict().items()
        if "experts" in key and "per_tok" not in key and type(value) is int and value > 1
    }
    signs = _signs(model, config, bool(layers_path))
    modules = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in signs))
    if modules:
        raise LayoutError(
            f"model_type {config.model_type!r} looks like a Mixture-of-Experts model that is not understood: "
            f"config keys {keys or 'none'}, modules {modules[:8]}; expected experts with stacked weights "
            f"({GATE_UP} or {UP}, and {DOWN}) in its layers, with a router beside them"
        )


def _signs(model: nn.Module, config: PreTrainedConfig, has_experts: bool) -> Iterator[str]:
    of_images = OF_IMAGES.get(config.model_type)
    for name, module in model.named_modules():
        leaf, kind = name.rpartition(".")[2], type(module).__name__
        stacked = [
            parameter_name
            for parameter_name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and parameter.shape[0] > 1
        ]
        if has_experts and (is_experts(module) or of_images in name.split(".")):
            continue
        if not has_experts and (re.search("experts?$", leaf) or re.search(r"(Experts?|MoE|Moe)$", kind)):
            yield name
        # The kernel of a convolution has three axes as well and is not a stack of matrices.
        elif stacked and not has_experts and not isinstance(module, nn.Conv1d):
            yield f"{name}.{stacked[0]}"
