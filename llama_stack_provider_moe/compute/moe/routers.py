"""The routers of a model: what `_can_record_outputs["router_logits"]` names, else the one module with a row per expert.

What a router returns is found by running a copy of it (`router_probe`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.exceptions import OF_IMAGES
from llama_stack_provider_moe.compute.moe.experts_modules import FoundExperts, is_experts
from llama_stack_provider_moe.compute.moe.layout import DOWN, bare, bare_name, find_module, join, text_config
from llama_stack_provider_moe.compute.moe.router_probe import RouterFacts, probe
from llama_stack_provider_moe.errors import LayoutError


@dataclass(frozen=True)
class FoundRouters:
    """The routers of a model: their path below a layer, the modules, and what the probe of one of them found."""

    path: str
    modules: dict[int, nn.Module]
    facts: RouterFacts
    by_token: tuple[int, ...]

    @property
    def first(self) -> nn.Module:
        """A router that chooses by its logits."""
        return next(module for layer, module in self.modules.items() if layer not in self.by_token)


def find_routers(model: PreTrainedModel, experts: FoundExperts) -> FoundRouters:
    config = text_config(model)
    stated = _stated_routers(model)
    found: dict[int, tuple[str, nn.Module, int | None]] = {}
    for layer in experts.modules:
        below, block = experts.block, find_module(model, join(experts.layers_path, str(layer), experts.block))
        name, router = _router_in(config, block, experts, layer, stated)
        found[layer] = (join(below, name), router, stated.get(type(router)))
    paths = {path for path, _, _ in found.values()}
    if len(paths) > 1:
        raise LayoutError(f"{config.model_type}: routers are in different places: {', '.join(sorted(paths))}")
    facts: dict[type, RouterFacts] = {}
    for layer, (_, router, at) in found.items():
        if type(router) not in facts:
            block = find_module(model, join(experts.layers_path, str(layer), experts.block))
            facts[type(router)] = probe(router, block, config.hidden_size, at)
    modules = {layer: router for layer, (_, router, _) in found.items()}
    by_token = tuple(layer for layer, router in modules.items() if facts[type(router)].by_token)
    chosen = [each for each in facts.values() if not each.by_token]
    if not chosen or any((each.width, each.top_k) != (chosen[0].width, chosen[0].top_k) for each in facts.values()):
        raise LayoutError(
            f"{config.model_type}: its routers differ: {[type(each).__name__ for each in modules.values()]}"
        )
    return FoundRouters(paths.pop(), modules, chosen[0], by_token)


def _stated_routers(model: PreTrainedModel) -> dict[type, int]:
    """Class of a module -> position of the router logits in its output, as the model classes state it."""
    stated: dict[type, int] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
            for recorder in recorded if isinstance(recorded, list) else [recorded]:
                if recorder is not None and isinstance(recorder.target_class, type):
                    stated[recorder.target_class] = recorder.index
    return stated


def _router_in(
    config: PreTrainedConfig, block: nn.Module, experts: FoundExperts, layer: int, stated: dict[type, int]
) -> tuple[str, nn.Module]:
    """Name below `block` and module of its router."""
    beside = {name: bare(child) for name, child in bare(block).named_children()}
    named = {name: child for name, child in beside.items() if type(child) in stated}
    if not named:
        count = experts.modules[layer].get_parameter(DOWN).shape[0]
        named = {name: child for name, child in beside.items()
                 if not is_experts(child) and any(p.dim() == 2 and p.shape[0] == count for p in _own_matrices(child))
                 and len(list(_own_matrices(child))) == 1}  # fmt: skip
    if len(named) != 1:
        raise LayoutError(
            f"{config.model_type}: expected one router beside the experts of layer {layer}, found "
            f"{list(named) or 'none'} among {', '.join(beside)}"
        )
    return next(iter(named.items()))


def _own_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if parameter.dim() == 2 and "lora_" not in name
            and min(parameter.shape) > 1)  # fmt: skip


def router_weight(config: PreTrainedConfig, routers: FoundRouters) -> str:
    """Name, below the router, of the matrix that computes the logits."""
    rows = {bare_name(name): parameter.shape[0] for name, parameter in routers.first.named_parameters()
            if parameter.dim() == 2 and parameter.shape[0] >= routers.facts.width and "lora_" not in name
            and "bias" not in name}  # fmt: skip
    closest = [name for name, count in rows.items() if count == min(rows.values())]
    if len(closest) != 1:
        raise LayoutError(f"{config.model_type}: {routers.path} has no one matrix for its logits: {list(rows)}")
    return closest[0]


def bias_path_of(experts: FoundExperts, routers: FoundRouters) -> str | None:
    if routers.facts.bias is None:
        return None
    place, name = routers.facts.bias
    return join(routers.path if place == "router" else experts.block, name)


def frozen_in_layer(
    model: nn.Module, experts: FoundExperts, routers: FoundRouters, bias_path: str | None
) -> tuple[str, ...]:
    """Parameters of a MoE layer that no optimiser may change: a bias for the choice, and experts of images."""
    frozen = []
    if bias_path is not None:
        layer = next(layer for layer in routers.modules if layer not in routers.by_token)
        parent, _, name = bias_path.rpartition(".")
        holder = find_module(model, join(experts.layers_path, str(layer), parent))
        if isinstance(getattr(holder, name), nn.Parameter):
            frozen.append(bias_path)
    if of_images := OF_IMAGES.get(text_config(model).model_type):
        frozen.append(join(experts.block.rpartition(".")[0], of_images))
    return tuple(frozen)
