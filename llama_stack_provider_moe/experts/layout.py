"""Config and module tree of a loaded model -> `ExpertLayout`: where its experts and routers are, and how many.

The tree is what trains, the config is what was meant: both are read, and a difference between them is an error.
A Mixture-of-Experts model of a family that is not in `families` is an error too, never a guess.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llama_stack_provider_moe.errors import LayoutError
from llama_stack_provider_moe.experts.families import BY_MODEL_TYPE, Family, Scoring

DEFAULT_AUX_COEF = 0.001
GATE_UP = "gate_up_proj"
DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts of one model are. `*_path` are below a decoder layer, `layers_path` is below the model."""

    family: str
    model_type: str
    layers_path: str
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    shared_experts: int
    shared_path: str | None
    block: str
    router_path: str
    experts_path: str
    gate_up: str
    down: str
    transposed: bool
    biased: bool
    scoring: Scoring
    logits_at: int
    chosen_at: int
    aux_loss: bool
    default_aux_coef: float
    grouped_mm: bool
    own_gate: bool
    needs_num_experts: bool
    peft_renames_mlp: bool
    frozen: tuple[str, ...]
    bias_path: str | None
    groups: int
    groups_chosen: int
    disk: dict[str, tuple[str, ...]]

    def routers(self, model: nn.Module) -> dict[int, nn.Module]:
        """The router of each MoE layer, itself and not an adapter around it."""
        return {layer: self.submodule(model, layer, self.router_path) for layer in self.moe_layers}

    def experts(self, model: nn.Module) -> dict[int, nn.Module]:
        """The module that holds the fused experts of each MoE layer, itself and not an adapter around it."""
        return {layer: self.submodule(model, layer, self.experts_path) for layer in self.moe_layers}

    def biases(self, model: nn.Module) -> dict[int, Tensor]:
        """The bias of each MoE layer that only steers the choice of its experts; empty where the family has none."""
        if self.bias_path is None:
            return {}
        parent, _, name = self.bias_path.rpartition(".")
        return {layer: getattr(self.submodule(model, layer, parent), name) for layer in self.moe_layers}

    def submodule(self, model: nn.Module, layer: int, below: str) -> nn.Module:
        """The module at `below` in decoder layer `layer`, itself and not an adapter around it."""
        return _find(self._layer(model, layer), below)

    def path(self, layer: int, below: str) -> str:
        """Full name, in the model without adapters, of what is at `below` in decoder layer `layer`."""
        return f"{self.layers_path}.{layer}.{below}"

    def disk_names(self, layer: int) -> set[str]:
        """Names of the tensors that hold this layer's routers and experts in a saved model."""
        return {
            self.path(layer, template.format(expert=expert))
            for templates in self.disk.values()
            for template in templates
            for expert in range(self.num_experts)
        }

    def text(self) -> str:
        """What was found, for the start of a job's log."""
        shared = f", {self.shared_experts} shared" if self.shared_experts else ""
        dense = f"; dense layers {_ranges(self.dense_layers)}" if self.dense_layers else ""
        return (
            f"{self.family} ({self.model_type}): {self.num_experts} experts{shared}, top-{self.top_k}, "
            f"in layers {_ranges(self.moe_layers)}{dense}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same, for `resolved.json`."""
        return asdict(self)

    def _layer(self, model: nn.Module, layer: int) -> nn.Module:
        module: nn.Module = without_adapters(model).get_submodule(f"{self.layers_path}.{layer}")
        return module


def find_layout(model: nn.Module) -> ExpertLayout | None:
    """The layout of a causal language model; None where it is dense.

    Raises:
        LayoutError: a Mixture-of-Experts model of a family that is not known, or one whose modules are not
            where its config says.
    """
    model = without_adapters(model)
    config = text_config(model)
    family = BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        _refuse_unknown(model, config)
        return None
    layers_path, layers = decoder_layers(model)
    num_experts = getattr(config, family.num_experts) or 0
    meant = [layer for layer in range(len(layers)) if num_experts and family.has_experts(config, layer)]
    found = [layer for layer, module in enumerate(layers) if _has(module, f"{family.block}.experts")]
    if meant != found:
        raise LayoutError(
            f"{config.model_type}: the config puts experts in layers {_ranges(meant)}, "
            f"the modules have them in layers {_ranges(found)}"
        )
    if not found:
        return None
    layout = _layout(family, config, layers_path, len(layers), found, num_experts)
    if family.bias is not None and not _holds(layers[found[0]], family.bias):
        layout = replace(layout, bias_path=None)  # LFM2 has it on request only
    for layer in found:
        _check_layer(layout, layers[layer], layer, config.hidden_size)
    return layout


def text_config(model: nn.Module) -> Any:
    """The language model's own config, also where it is part of a composite one."""
    return without_adapters(model).config.get_text_config()


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside `model`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the one list named `layers` that is as long as the text config says.

    Raises:
        LayoutError: there is none, or more than one.
    """
    # Not `get_decoder()`: transformers 5.23 gives the whole model for Llama 4.
    wanted = text_config(model).num_hidden_layers
    lists = [
        (name, module)
        for name, module in without_adapters(model).named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module) == wanted
    ]
    if len(lists) != 1:
        raise LayoutError(
            f"{text_config(model).model_type}: expected one list of {wanted} decoder layers named 'layers', "
            f"found {[name for name, _ in lists] or 'none'}"
        )
    return lists[0]


def _layout(
    family: Family, config: Any, layers_path: str, num_layers: int, found: list[int], num_experts: int
) -> ExpertLayout:
    shared_experts = family.shared_count(config) if family.shared else 0
    return ExpertLayout(
        family=family.name,
        model_type=config.model_type,
        layers_path=layers_path,
        moe_layers=tuple(found),
        dense_layers=tuple(layer for layer in range(num_layers) if layer not in found),
        num_experts=num_experts,
        top_k=getattr(config, family.top_k),
        shared_experts=shared_experts,
        shared_path=family.shared if shared_experts else None,
        block=family.block,
        router_path=f"{family.block}.{family.router}",
        experts_path=f"{family.block}.experts",
        gate_up=GATE_UP,
        down=DOWN,
        transposed=family.transposed,
        biased=family.biased,
        scoring=family.scoring(config),
        logits_at=family.logits_at,
        chosen_at=family.chosen_at,
        aux_loss=family.aux_loss,
        default_aux_coef=DEFAULT_AUX_COEF if family.aux_loss else 0.0,
        grouped_mm=family.grouped_mm,
        own_gate=family.own_gate,
        needs_num_experts=family.needs_num_experts,
        peft_renames_mlp=family.peft_renames_mlp,
        frozen=family.frozen,
        bias_path=family.bias,
        groups=getattr(config, family.groups[0]) if family.groups else 1,
        groups_chosen=getattr(config, family.groups[1]) if family.groups else 1,
        disk=dict(family.disk),
    )


def _check_layer(layout: ExpertLayout, module: nn.Module, layer: int, hidden: int) -> None:
    """Compare one layer's parameters with what config and family say of them."""
    count = layout.num_experts
    shapes = {name: tuple(parameter.shape) for name, parameter in _bare_parameters(module)}
    hidden_axis = 1 if layout.transposed else 2
    expected: dict[str, dict[int, int]] = {
        f"{layout.router_path}.weight": {0: count, 1: hidden},
        f"{layout.experts_path}.{layout.gate_up}": {0: count, hidden_axis: hidden},
        f"{layout.experts_path}.{layout.down}": {0: count, 3 - hidden_axis: hidden},
    }
    if layout.biased:
        expected |= {
            f"{layout.router_path}.bias": {0: count},
            f"{layout.experts_path}.{layout.gate_up}_bias": {0: count},
            f"{layout.experts_path}.{layout.down}_bias": {0: count, 1: hidden},
        }
    for name, axes in expected.items():
        shape = shapes.get(name)
        if shape is None or any(axis >= len(shape) or shape[axis] != size for axis, size in axes.items()):
            wanted = ", ".join(f"{size} on axis {axis}" for axis, size in axes.items())
            raise LayoutError(
                f"{layout.model_type}: {layout.path(layer, name)} has shape {shape}, expected {wanted} "
                f"({count} experts, hidden size {hidden})"
            )
    family = BY_MODEL_TYPE[layout.model_type]
    if family.shared and _has(module, family.shared) != bool(layout.shared_experts):
        raise LayoutError(
            f"{layout.model_type}: the config says {layout.shared_experts} shared experts, but "
            f"{layout.path(layer, family.shared)} is {'there' if not layout.shared_experts else 'missing'}"
        )


def _refuse_unknown(model: nn.Module, config: Any) -> None:
    """Raise if a model without a row in the table shows any sign of experts."""
    keys = {
        key: value
        for key, value in config.to_dict().items()
        if "experts" in key and "per_tok" not in key and type(value) is int and value > 1
    }
    modules = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in _signs(model)))
    if keys or modules:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise LayoutError(
            f"model_type {config.model_type!r} looks like a Mixture-of-Experts model that this version does not know: "
            f"config keys {keys or 'none'}, modules {modules[:8] or 'none'}; known are {known}"
        )


def _signs(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        leaf, kind = name.rpartition(".")[2], type(module).__name__
        stacked = [
            parameter_name
            for parameter_name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and parameter.shape[0] > 1
        ]
        if re.search("experts?$", leaf) or re.search(r"(Experts?|MoE|Moe)$", kind):
            yield name
        # A convolution's kernel has three axes as well, and is no stack of matrices.
        elif stacked and not isinstance(module, nn.Conv1d):
            yield f"{name}.{stacked[0]}"


def _find(module: nn.Module, path: str) -> nn.Module:
    """The module at `path`, where any module on the way may be wrapped by adapters."""
    for part in path.split("."):
        module = _bare(_bare(module).get_submodule(part))
    return module


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        child = dict(_bare(module).named_children()).get(part)
        if child is None:
            return False
        module = child
    return True


def _holds(module: nn.Module, path: str) -> bool:
    """Whether there is a parameter or buffer at `path`."""
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    return path in (name.replace(".base_layer", "") for name in names)


def _bare(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        bare: nn.Module = module.get_base_layer()
        return bare
    return module


def _bare_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        yield name.replace(".base_layer", ""), parameter


def _ranges(numbers: Iterator[int] | tuple[int, ...] | list[int]) -> str:
    """`0, 2-5`; `none` where there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
