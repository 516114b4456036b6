"""Rank, alpha and learning rate for each target of an adapter, and for single experts (plan `per_expert`).

In PEFT, one LoRA on fused experts has one rank R. For experts with a smaller rank the remaining rows of A, and with
them the columns of B, are zero, and no gradient changes them: all experts share the scale alpha / R, and an expert of
rank 0 adds nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.targets import Targets, layer_of
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, AdapterGroup, RulesFrom, numbers, ranges


@dataclass(frozen=True)
class TargetSettings:
    """LoRA settings of one target.

    Attributes:
        rank: the rank; with several experts the largest.
        alpha: LoRA's alpha.
        rate: multiplier of the learning rate.
        expert_ranks: rank of each expert; empty if all have `rank`.
        expert_rates: further multiplier for each expert; empty if all are 1.
    """

    rank: int
    alpha: float
    rate: float
    expert_ranks: tuple[int, ...] = ()
    expert_rates: tuple[float, ...] = ()


def settings_by_target(adapter: Adapter, targets: Targets, layout: ExpertLayout | None) -> dict[str, TargetSettings]:
    """Name of each target -> its settings; removes layers in which no rule names an expert from `targets`.

    Raises:
        AdapterError: a rule names a layer or expert that this model does not have, or a setting is for a group that
            gets no LoRA.
    """
    experts = _by_rule(adapter, layout) if adapter.plan == "per_expert" and layout is not None else None
    if experts is not None:
        _drop_unnamed(adapter, targets, experts)
    groups = set(targets.all.values())
    for field, values in (("alphas", adapter.alphas), ("lr_multipliers", adapter.lr_multipliers)):
        _refuse_unread(field, values, groups)
    if adapter.router_rank is not None and "router" not in groups:
        raise AdapterError(
            f"adapter.router_rank: {adapter.router_rank} would have no effect: routers get no LoRA without "
            "moe.train_router true"
        )
    if adapter.expert_modules != Adapter().expert_modules and "experts" not in groups:
        raise AdapterError("adapter.expert_modules: would have no effect: this adapter has no LoRA on experts")
    return {name: _settings(adapter, name, group, experts) for name, group in targets.all.items()}


def _settings(
    adapter: Adapter, name: str, group: AdapterGroup, experts: Mapping[int, "_LayersExperts"] | None
) -> TargetSettings:
    rank = (adapter.router_rank if group == "router" else None) or adapter.rank
    alpha, rate = adapter.alphas.get(group, adapter.alpha), adapter.lr_multipliers.get(group, 1.0)
    if group != "experts" or experts is None:
        return TargetSettings(rank, alpha, rate)
    layer = layer_of(name)
    assert layer is not None, name
    mine = experts[layer]
    largest = max(mine.ranks)
    return TargetSettings(
        largest,
        alpha,
        rate,
        expert_ranks=() if min(mine.ranks) == largest else tuple(mine.ranks),
        expert_rates=() if set(mine.rates) == {1.0} else tuple(mine.rates),
    )


@dataclass
class _LayersExperts:
    ranks: list[int]
    rates: list[float]


def _by_rule(adapter: Adapter, layout: ExpertLayout) -> dict[int, _LayersExperts]:
    """MoE layer -> ranks and rates of its experts."""
    _refuse_rules_of_another_model(adapter, layout)
    count = layout.num_experts
    found = {layer: _LayersExperts([0] * count, [1.0] * count) for layer in layout.moe_layers}
    for index, rule in enumerate(adapter.rules):
        layers = list(found) if rule.layers is None else list(numbers(rule.layers))
        if unknown := [layer for layer in layers if layer not in found]:
            raise AdapterError(
                f"adapter.rules.{index}.layers: {rule.layers!r} names layer {unknown[0]}, which has no experts; "
                f"expected layers among {_listed(layout.moe_layers)}"
            )
        for text, rank in rule.experts.items():
            for expert in numbers(text):
                if expert >= count:
                    raise AdapterError(
                        f"adapter.rules.{index}.experts: {text!r} names expert {expert}; expected 0 to {count - 1}"
                    )
                for layer in layers:
                    found[layer].ranks[expert] = rank
                    found[layer].rates[expert] = rule.lr_multiplier
    return found


def _refuse_rules_of_another_model(adapter: Adapter, layout: ExpertLayout) -> None:
    reason = None if adapter.rules_from is None else of_another_model(adapter.rules_from, layout)
    if reason is not None:
        raise AdapterError(f"adapter.rules_from: {reason}")


def of_another_model(origin: RulesFrom, layout: ExpertLayout) -> str | None:
    """How the model of an analysis differs from this one; None if their experts have the same numbers."""
    if (origin.moe_layers, origin.num_experts) == (list(layout.moe_layers), layout.choices):
        return None
    return (
        f"{origin.analysis!r} is an analysis of another model, of {origin.num_experts} experts in layers "
        f"{', '.join(ranges(origin.moe_layers))}; this one has {layout.choices} in layers "
        f"{', '.join(ranges(layout.moe_layers))}"
    )


def _drop_unnamed(adapter: Adapter, targets: Targets, experts: Mapping[int, _LayersExperts]) -> None:
    unnamed = {layer for layer, its in experts.items() if not any(its.ranks)}
    inside = {layer_of(name) for name, group in targets.parameters.items() if group == "experts"}
    if adapter.layers is not None and (outside := sorted(set(experts) - unnamed - inside)):
        raise AdapterError(
            f"adapter.layers: {adapter.layers!r} excludes layer {outside[0]}, whose experts adapter.rules name"
        )
    for name in [
        name for name, group in targets.parameters.items() if group == "experts" and layer_of(name) in unnamed
    ]:
        del targets.parameters[name]
    named = {layer: [e for e, rank in enumerate(its.ranks) if rank] for layer, its in experts.items()}
    total = sum(len(each) for each in named.values())
    targets.notes.append(
        f"{total} of {sum(len(its.ranks) for its in experts.values())} experts get LoRA, in "
        f"{sum(bool(each) for each in named.values())} of {len(experts)} layers; the others do not change"
    )
    if adapter.rules_from is not None:
        chosen = "; ".join(f"layer {layer}: {', '.join(ranges(each))}" for layer, each in named.items() if each)
        targets.notes.append(f"experts by {adapter.rules_from.analysis}: {chosen}")


def _refuse_unread(field: str, values: Mapping[AdapterGroup, float], groups: set[AdapterGroup]) -> None:
    if unread := sorted(set(values) - groups):
        raise AdapterError(
            f"adapter.{field}: {unread[0]} would have no effect: this adapter only has {', '.join(sorted(groups))}"
        )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
