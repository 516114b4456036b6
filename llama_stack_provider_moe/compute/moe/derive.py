"""`find_layout`: where a model's experts are, derived from what transformers states, not from a list of families.

Experts, routers and the parts beside them are found in the module tree; a copy of a router shows what it returns; the
model that the config describes must agree. A model that shows signs of experts and is not understood is an error;
nothing is guessed. `exceptions` holds the little that can't be derived.
"""

import inspect
import re
from typing import Any

from peft.utils import transformers_weight_conversion as peft_conversion
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.described import (
    compare_beside,
    compare_layers,
    compare_shapes,
    described_model,
    mentions_experts,
    original_class,
    refuse_signs,
    stack_shapes,
)
from llama_stack_provider_moe.compute.moe.exceptions import REFUSED, SCORINGS
from llama_stack_provider_moe.compute.moe.experts_modules import FoundExperts, find_experts
from llama_stack_provider_moe.compute.moe.layout import (
    DEFAULT_AUX_COEF,
    DOWN,
    GATE_UP,
    SPLIT_MLP,
    UP,
    ExpertLayout,
    find_module,
    text_config,
    without_adapters,
)
from llama_stack_provider_moe.compute.moe.num_experts import lacks_num_experts
from llama_stack_provider_moe.compute.moe.parallel_parts import parallel_parts, shared_count
from llama_stack_provider_moe.compute.moe.router_probe import RouterFacts
from llama_stack_provider_moe.compute.moe.routers import (
    FoundRouters,
    bias_path_of,
    find_routers,
    frozen_in_layer,
    router_weight,
)
from llama_stack_provider_moe.errors import LayoutError

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"), ("n_groups", "topk_groups"))


def find_layout(model: nn.Module) -> ExpertLayout | None:
    """The layout of a language model, also of one inside a composite model; None if it is dense.

    Raises:
        LayoutError: a Mixture-of-Experts model that is not understood, or one that differs from its config.
    """
    return _find(without_adapters(model))


def _find(model: PreTrainedModel) -> ExpertLayout | None:
    config = text_config(model)
    whole = str(model.config.model_type)
    if reason := REFUSED.get(whole):
        raise LayoutError(f"model_type {whole!r} is a Mixture-of-Experts model that this version can't train: {reason}")
    experts = find_experts(model, config)
    if experts is None and not mentions_experts(config):
        refuse_signs(model, config, "")
        return None
    described = described_model(model)
    meant = find_experts(described, config)
    compare_layers(config, experts, meant)
    if experts is None or meant is None:
        refuse_signs(model, config, "")
        return None
    refuse_signs(model, config, experts.layers_path)
    compare_shapes(config, *(stack_shapes(each) for each in (experts, meant)))
    routers = find_routers(model, experts)
    layout = _layout(model, config, experts, routers)
    compare_beside(model, described, layout)
    return layout


def _layout(
    model: PreTrainedModel, config: PreTrainedConfig, experts: FoundExperts, routers: FoundRouters
) -> ExpertLayout:
    first = next(iter(experts.modules.values()))
    facts = routers.facts
    num_experts = _same(config, experts, lambda module: int(module.get_parameter(DOWN).shape[0]), "number of experts")
    has_gate = hasattr(first, GATE_UP)
    decorated = hasattr(first, "is_concatenated")
    layers = find_module(model, experts.layers_path)
    dense = tuple(layer for layer in range(len(list(layers.children()))) if layer not in experts.modules)
    shared_path, mlps = parallel_parts(model, experts, dense)
    groups, groups_chosen = groups_of(config, facts)
    bias_path = bias_path_of(experts, routers)
    scoring = facts.scoring or SCORINGS.get(type(routers.first).__name__)
    if scoring is None:
        raise LayoutError(
            f"{config.model_type}: the weights of {type(routers.first).__name__} are not a known function of its logits"
        )
    aux_loss = computes_balance_loss(model)
    return ExpertLayout(
        family=_family(model),
        model_type=config.model_type,
        layers_path=experts.layers_path,
        moe_layers=tuple(sorted(experts.modules)),
        dense_layers=dense,
        num_experts=num_experts,
        top_k=checked_top_k(config, facts.top_k),
        shared_experts=shared_count(config) if shared_path else 0,
        shared_path=shared_path,
        block=experts.block,
        router_path=routers.path,
        router_weight=router_weight(config, routers),
        experts_path=experts.path,
        gate_up=GATE_UP if has_gate else UP,
        down=DOWN,
        transposed=_is_transposed(first, has_gate),
        biased=f"{DOWN}_bias" in dict(first.named_parameters(recurse=False)),
        scoring=scoring,
        logits_at=facts.logits_at,
        chosen_at=facts.chosen_at,
        idle_choices=max(0, facts.width - num_experts),
        by_token_layers=routers.by_token,
        aux_loss=aux_loss,
        default_aux_coef=DEFAULT_AUX_COEF if aux_loss else 0.0,
        grouped_mm=decorated,
        experts_class=type(first).__name__,
        own_gate=not hasattr(first, "act_fn"),
        needs_num_experts=aux_loss and lacks_num_experts(config),
        peft_renames_mlp=peft_renames_mlp(model),
        frozen=frozen_in_layer(model, experts, routers, bias_path),
        bias_path=bias_path,
        groups=groups,
        groups_chosen=groups_chosen,
        dense_mlps=mlps,
        weighing=facts.weighing,
    )


def _same(config: PreTrainedConfig, experts: FoundExperts, read: Any, what: str) -> Any:
    values = {layer: read(module) for layer, module in experts.modules.items()}
    if len(set(values.values())) > 1:
        raise LayoutError(f"{config.model_type}: layers differ in their {what}: {values}")
    return next(iter(values.values()))


def _family(model: PreTrainedModel) -> str:
    name = original_class(model).__name__
    return re.sub(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$", "", name)


def _is_transposed(experts: nn.Module, has_gate: bool) -> bool:
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    up, down = (tuple(experts.get_parameter(name).shape) for name in (GATE_UP if has_gate else UP, DOWN))
    return (up[1], up[2]) == (down[2], (1 + has_gate) * down[1])


def checked_top_k(config: PreTrainedConfig, top_k: int) -> int:
    said = {key: getattr(config, key) for key in TOP_K_KEYS if type(getattr(config, key, None)) is int}
    if wrong := {key: value for key, value in said.items() if value != top_k}:
        raise LayoutError(
            f"{config.model_type}: routers choose {top_k} experts for a token, the config says "
            f"{', '.join(f'{key} {value}' for key, value in wrong.items())}"
        )
    return top_k


def groups_of(config: PreTrainedConfig, facts: RouterFacts) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use (arXiv 2412.19437, 2.1.2); 1 and 1 without groups."""
    for count_key, chosen_key in _GROUPS:
        count, chosen = getattr(config, count_key, None), getattr(config, chosen_key, None)
        if type(count) is int and type(chosen) is int and count > 1 and facts.width % count == 0:
            # A config may have the keys of a choice by groups that its router does not make (DeepSeek-V2's `greedy`).
            return (count, chosen) if facts.most_groups(count) <= chosen else (1, 1)
    return 1, 1


def computes_balance_loss(model: PreTrainedModel) -> bool:
    """Whether the model's forward adds a balance loss to its own loss."""
    return "load_balancing_loss_func" in inspect.unwrap(original_class(model).forward).__code__.co_names


def peft_renames_mlp(model: PreTrainedModel) -> bool:
    """Whether PEFT takes targets named as linear layers of an MLP for experts (peft 0.21)."""
    like = peft_conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return bool(SPLIT_MLP & set(peft_conversion._MOE_TARGET_MODULE_MAPPING.get(like, ())))
