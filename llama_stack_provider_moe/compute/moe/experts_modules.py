"""The modules that hold a model's routed experts, by what transformers states about them.

They are of classes decorated with `use_experts_implementation`, or have stacked projections.
"""

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.moe.exceptions import OF_IMAGES
from llama_stack_provider_moe.compute.moe.layout import DOWN, GATE_UP, UP, bare_name, decoder_layers
from llama_stack_provider_moe.errors import LayoutError


@dataclass(frozen=True)
class FoundExperts:
    """Where the experts of a model are: the list of decoder layers, the path below a layer, and the modules."""

    layers_path: str
    path: str
    modules: dict[int, nn.Module]

    @property
    def block(self) -> str:
        return self.path.rpartition(".")[0]


def is_experts(module: nn.Module) -> bool:
    """Whether a module, without an adapter around it, holds the stacked weights of routed experts."""
    if isinstance(module, BaseTunerLayer):
        return False
    if all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return True
    own = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return own.get(DOWN) == 3 and (own.get(GATE_UP) == 3 or own.get(UP) == 3)


def find_experts(model: nn.Module, config: PreTrainedConfig) -> FoundExperts | None:
    """The routed experts of the text part.

    Raises:
        LayoutError: they are in more than one place.
    """
    of_images = OF_IMAGES.get(config.model_type)
    places: dict[tuple[str, str], dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        parts = bare_name(name).split(".")
        if not is_experts(module) or of_images in parts or "shared" in parts[-1]:
            continue
        at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            raise LayoutError(f"{config.model_type}: experts {name} are not in a numbered layer")
        places.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), {})[int(parts[at])] = module
    if len(places) > 1:  # another part of a composite model may have experts too
        text_path, _ = decoder_layers(model)
        places = {place: modules for place, modules in places.items() if place[0] == text_path}
    if len(places) > 1:
        listed = ", ".join(f"{layers}.*.{path}" for layers, path in places)
        raise LayoutError(f"{config.model_type}: expected one block of experts in a layer, found {listed}")
    for (layers_path, path), modules in places.items():
        return FoundExperts(layers_path, path, modules)
    return None
