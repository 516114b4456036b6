"""The modules and parameters that an adapter targets, by full name, found in the module tree.

A module target is a linear layer; a parameter target is a fused 3-D expert weight, or a weight whose module PEFT
would mistake for something else. Every layer is named, because PEFT's layer filters don't work for parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from torch import nn

from llama_stack_provider_moe.compute.moe.layout import SPLIT_MLP, ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.vision_parts import wanted_layers
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, AdapterGroup, AttentionModule, numbers

GROUPS: tuple[AdapterGroup, ...] = get_args(AdapterGroup)

_Q: AttentionModule = "q_proj"
_K: AttentionModule = "k_proj"
_V: AttentionModule = "v_proj"
_OUT: AttentionModule = "output_proj"

# Linear layer of an attention module -> the API's projections that it contains.
_ATTENTION: dict[str, frozenset[AttentionModule]] = {
    "q_proj": frozenset({_Q}),
    "k_proj": frozenset({_K}),
    "v_proj": frozenset({_V}),
    "o_proj": frozenset({_OUT}),
    "out_proj": frozenset({_OUT}),
    # Phi-3 and others: one layer for all three.
    "qkv_proj": frozenset({_Q, _K, _V}),
    # DeepSeek's latent attention: one bottleneck for queries, another for keys and values.
    "q_a_proj": frozenset({_Q}),
    "q_b_proj": frozenset({_Q}),
    "kv_a_proj_with_mqa": frozenset({_K, _V}),
    "kv_b_proj": frozenset({_K, _V}),
    # DeepSeek-V4: keys and values are one; the output is projected twice, first in groups, which is no linear layer.
    "kv_proj": frozenset({_K, _V}),
    "o_b_proj": frozenset({_OUT}),
    # Zaya: values of this token and of the one before.
    "v_proj_current": frozenset({_V}),
    "v_proj_delayed": frozenset({_V}),
    # The linear attention of Qwen3-Next (with its gate z) and Qwen3.5.
    "in_proj_qkvz": frozenset({_Q, _K, _V}),
    "in_proj_qkv": frozenset({_Q, _K, _V}),
}
_ATTENTION_MODULES = ("self_attn", "linear_attn")
# Nemotron-H names whatever a layer has `mixer`: attention, Mamba, an MLP or experts.
_MIXER, _OF_MIXER = "mixer", ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_MODULES = ("mlp", "feed_forward", "shared_mlp")


@dataclass
class Targets:
    """Full name (in the model without adapters) of each target -> its group."""

    modules: dict[str, AdapterGroup] = field(default_factory=dict)
    parameters: dict[str, AdapterGroup] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def all(self) -> dict[str, AdapterGroup]:
        """Modules and parameters together."""
        return {**self.modules, **self.parameters}

    def keep_layers(self, wanted: set[int]) -> None:
        """Remove the targets in other decoder layers; targets outside the layers stay."""
        for targets in (self.modules, self.parameters):
            for name in [name for name in targets if layer_of(name) not in {None, *wanted}]:
                del targets[name]


def find_targets(model: nn.Module, adapter: Adapter, layout: ExpertLayout | None, train_router: bool) -> Targets:
    """Find everything that `adapter` (and `train_router`) asks for.

    Args:
        model: the model without adapters.
        adapter: the job's adapter block.
        layout: where the experts are; None: a dense model.
        train_router: whether routers get LoRA.

    Raises:
        AdapterError: the model lacks a target, or can't adapt it separately.
    """
    targets = Targets()
    if adapter.lora_attn_modules:
        _add_attention(targets, model, frozenset(adapter.lora_attn_modules))
    if layout is None and adapter.plan not in (None, "trunk"):
        raise AdapterError(f"adapter.plan: {adapter.plan!r} is not valid for this model: it has no experts")
    if adapter.apply_lora_to_mlp:
        if layout is None:
            _add_dense_mlp(targets, model)
        else:
            _add_mlp(targets, model, layout)
            if adapter.plan != "trunk":
                _add_experts(targets, adapter, layout)
    if adapter.apply_lora_to_output:
        targets.modules[_output_head(model)] = "output_head"
    if train_router and layout is not None:
        for layer in layout.moe_layers:
            targets.parameters[layout.path(layer, f"{layout.router_path}.{layout.router_weight}")] = "router"
    if not targets.all and adapter.vision == "off":
        raise AdapterError("adapter: an adapter without a target trains nothing; set lora_attn_modules, "
                           "apply_lora_to_mlp or apply_lora_to_output, or moe.train_router true")  # fmt: skip
    if set(targets.all.values()) == {"router"} and adapter.vision == "off":
        targets.notes.append("only the routers have LoRA; every other weight stays as it is")
    if adapter.layers is not None:
        _keep_layers(targets, model, adapter.layers)
    if adapter.vision != "off":
        _add_vision(targets, model, adapter.vision, layout)
    if adapter.plan == "trunk" and layout is not None:
        targets.notes.append("experts are frozen (adapter.plan trunk)")
    return targets


def _add_vision(targets: Targets, model: nn.Module, vision: str, layout: ExpertLayout | None) -> None:
    for name, part in wanted_layers(model, vision).items():
        # PEFT looks at the last part of a name alone, so it takes those of a tower for experts too.
        if layout is not None and layout.peft_renames_mlp and name.rpartition(".")[2] in SPLIT_MLP:
            targets.parameters[f"{name}.weight"] = part
        else:
            targets.modules[name] = part


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that contains `name`; None outside the layers."""
    _, found, below = name.partition(".layers.")
    return int(below.partition(".")[0]) if found else None


def _keep_layers(targets: Targets, model: nn.Module, layers: str) -> None:
    wanted, there = set(numbers(layers)), len(decoder_layers(model)[1])
    if beyond := sorted(wanted - set(range(there))):
        raise AdapterError(f"adapter.layers: {layers!r} names layer {beyond[0]}; this model has 0 to {there - 1}")
    asked = set(targets.all.values())
    targets.keep_layers(wanted)
    if lost := sorted(asked - set(targets.all.values())):
        raise AdapterError(f"adapter.layers: {layers!r} leaves nothing to adapt of {', '.join(lost)}")


def _add_attention(targets: Targets, model: nn.Module, wanted: frozenset[AttentionModule]) -> None:
    seen: list[str] = []
    reached: set[AttentionModule] = set()
    for name, parent, leaf in _linear_layers(model):
        if parent not in _ATTENTION_MODULES and not (parent == _MIXER and leaf in _OF_MIXER):
            continue
        seen.append(f"{parent}.{leaf}")
        held = _ATTENTION.get(leaf, frozenset())
        if held <= wanted and held:
            targets.modules[name] = "attention"
            reached |= held
        elif held & wanted:
            raise AdapterError(
                f"adapter.lora_attn_modules: {sorted(wanted)} is not valid for this model: {parent}.{leaf} combines "
                f"{', '.join(sorted(held))}; expected all of them or none"
            )
    if missing := sorted(wanted - reached):
        raise AdapterError(
            f"adapter.lora_attn_modules: this {text_config(model).model_type} model has no {', '.join(missing)}; "
            f"its attention has {sorted(set(seen)) or 'no linear layers under self_attn'}"
        )
    path, layers = decoder_layers(model)
    adapted = {name.removeprefix(f"{path}.").partition(".")[0] for name in targets.modules}
    if without := [str(layer) for layer in range(len(layers)) if str(layer) not in adapted]:
        targets.notes.append(f"layers {', '.join(without)} have no attention to adapt")


def _add_experts(targets: Targets, adapter: Adapter, layout: ExpertLayout) -> None:
    weights = {"gate_up_proj": layout.gate_up, "down_proj": layout.down}
    for layer in layout.moe_layers:
        for module in adapter.expert_modules:
            targets.parameters[layout.path(layer, f"{layout.experts_path}.{weights[module]}")] = "experts"


def _add_mlp(targets: Targets, model: nn.Module, layout: ExpertLayout) -> None:
    """Target the MLPs that every token uses: shared experts, and dense MLPs."""
    for layer in layout.moe_layers:
        if layout.shared_path is not None:
            _add_linear_below(targets, model, layout.path(layer, layout.shared_path), "shared_experts", layout)
    for path in layout.dense_mlps:
        _add_linear_below(targets, model, path, "dense_mlp", layout)


def _add_linear_below(targets: Targets, model: nn.Module, path: str, group: AdapterGroup, layout: ExpertLayout) -> None:
    names = [name for name, _, _ in _linear_layers(model) if name.startswith(f"{path}.")]
    if not names:
        raise AdapterError(f"adapter.apply_lora_to_mlp: {path} ({group}) has no linear layer to adapt")
    for name in names:
        if layout.peft_renames_mlp:
            targets.parameters[f"{name}.weight"] = group
        else:
            targets.modules[name] = group


def _add_dense_mlp(targets: Targets, model: nn.Module) -> None:
    seen = []
    for name, parent, leaf in _linear_layers(model):
        seen.append(f"{parent}.{leaf}")
        if parent in _MLP_MODULES:
            targets.modules[name] = "dense_mlp"
    if "dense_mlp" not in targets.modules.values():
        raise AdapterError(
            f"adapter.apply_lora_to_mlp: no linear layer under {', '.join(_MLP_MODULES)} in this "
            f"{text_config(model).model_type} model; its linear layers are {sorted(set(seen))}"
        )


def _output_head(model: nn.Module) -> str:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise AdapterError(
            "adapter.apply_lora_to_output: true is not valid for this model: its output head is its embedding matrix "
            "(tie_word_embeddings), and merging the adapter would change both; expected false"
        )
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Full name, parent's name and own name of linear layers in the decoder, not in other towers.

    A number in a list, and a module that only holds the projections, are not parents.
    """
    path, layers = decoder_layers(model)
    for below, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            _, *above, leaf = below.split(".")
            parents = [part for part in above if not part.isdigit() and part not in _ATTENTION]
            yield f"{path}.{below}", parents[-1] if parents else "", leaf
