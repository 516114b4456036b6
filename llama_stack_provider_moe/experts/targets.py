"""Which modules and parameters of a model an adapter goes to, each by its full name, found in the module tree.

A module target is a linear layer; a parameter target is a fused 3-D expert weight, or a weight whose module PEFT
would mistake for something else. Every layer is named: PEFT's own layer filters don't work for parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.experts.layout import ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.spec import Adapter, AttentionModule

Group = Literal["attention", "experts", "shared experts", "dense MLP", "router", "output head"]
GROUPS: tuple[Group, ...] = ("attention", "experts", "shared experts", "dense MLP", "router", "output head")

_Q: AttentionModule = "q_proj"
_K: AttentionModule = "k_proj"
_V: AttentionModule = "v_proj"
_OUT: AttentionModule = "output_proj"

# Linear layer of an attention module -> the projections of the API that it holds.
_ATTENTION: dict[str, frozenset[AttentionModule]] = {
    "q_proj": frozenset({_Q}),
    "k_proj": frozenset({_K}),
    "v_proj": frozenset({_V}),
    "o_proj": frozenset({_OUT}),
    "out_proj": frozenset({_OUT}),
    # Phi-3 and others: one projection for all three.
    "qkv_proj": frozenset({_Q, _K, _V}),
    # DeepSeek's latent attention: queries through a bottleneck, keys and values through one of their own.
    "q_a_proj": frozenset({_Q}),
    "q_b_proj": frozenset({_Q}),
    "kv_a_proj_with_mqa": frozenset({_K, _V}),
    "kv_b_proj": frozenset({_K, _V}),
    # The linear attention of Qwen3-Next (with its gate z) and Qwen3.5.
    "in_proj_qkvz": frozenset({_Q, _K, _V}),
    "in_proj_qkv": frozenset({_Q, _K, _V}),
}
_ATTENTION_MODULES = ("self_attn", "linear_attn")
_MLP_MODULES = ("mlp", "feed_forward", "shared_mlp")


@dataclass
class Targets:
    """Full name (in the model without adapters) of each target -> the group it is counted in."""

    modules: dict[str, Group] = field(default_factory=dict)
    parameters: dict[str, Group] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def all(self) -> dict[str, Group]:
        """Modules and parameters."""
        return {**self.modules, **self.parameters}


def find_targets(model: nn.Module, adapter: Adapter, layout: ExpertLayout | None, train_router: bool) -> Targets:
    """Everything that `adapter` (and `train_router`) asks for.

    Raises:
        AdapterError: something asked for is nowhere in this model, or can't be had alone.
    """
    targets = Targets()
    if adapter.lora_attn_modules:
        _add_attention(targets, model, frozenset(adapter.lora_attn_modules))
    if adapter.apply_lora_to_mlp:
        if layout is None:
            _add_dense_mlp(targets, model)
        else:
            _add_experts(targets, model, layout)
    if adapter.apply_lora_to_output:
        targets.modules[_output_head(model)] = "output head"
    if train_router and layout is not None:
        for layer in layout.moe_layers:
            targets.parameters[layout.path(layer, f"{layout.router_path}.weight")] = "router"
    return targets


def _add_attention(targets: Targets, model: nn.Module, wanted: frozenset[AttentionModule]) -> None:
    seen: list[str] = []
    reached: set[AttentionModule] = set()
    for name, parent, leaf in _linear_layers(model):
        if parent not in _ATTENTION_MODULES:
            continue
        seen.append(f"{parent}.{leaf}")
        held = _ATTENTION.get(leaf, frozenset())
        if held <= wanted and held:
            targets.modules[name] = "attention"
            reached |= held
        elif held & wanted:
            raise AdapterError(
                f"adapter.lora_attn_modules: {sorted(wanted)} is not valid for this model: {parent}.{leaf} holds "
                f"{', '.join(sorted(held))} in one; name all of them or none"
            )
    if missing := sorted(wanted - reached):
        raise AdapterError(
            f"adapter.lora_attn_modules: {', '.join(missing)} found nowhere in this {text_config(model).model_type} "
            f"model; its attention has {sorted(set(seen)) or 'no linear layers under self_attn'}"
        )
    path, layers = decoder_layers(model)
    adapted = {name.removeprefix(f"{path}.").partition(".")[0] for name in targets.modules}
    if without := [str(layer) for layer in range(len(layers)) if str(layer) not in adapted]:
        targets.notes.append(f"layers {', '.join(without)} have no attention to adapt")


def _add_experts(targets: Targets, model: nn.Module, layout: ExpertLayout) -> None:
    for layer in layout.moe_layers:
        for weight in (layout.gate_up, layout.down):
            targets.parameters[layout.path(layer, f"{layout.experts_path}.{weight}")] = "experts"
        if layout.shared_path is not None:
            _add_linear_below(targets, model, layout.path(layer, layout.shared_path), "shared experts", layout)
    for layer in layout.dense_layers:
        _add_linear_below(targets, model, layout.path(layer, layout.block), "dense MLP", layout)


def _add_linear_below(targets: Targets, model: nn.Module, path: str, group: Group, layout: ExpertLayout) -> None:
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
            targets.modules[name] = "dense MLP"
    if "dense MLP" not in targets.modules.values():
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
    """Full name, parent's name and own name of the decoder layers' linear layers, and of no other tower's."""
    path, layers = decoder_layers(model)
    for below, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            parts = below.split(".")
            yield f"{path}.{below}", parts[-2], parts[-1]
