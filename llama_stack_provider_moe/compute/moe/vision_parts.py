"""The linear layers between an image and the language model: those of the vision tower, and those of the projector."""

import re
from collections import Counter
from typing import Literal

from torch import nn

from llama_stack_provider_moe.compute.moe.layout import outside_text, without_adapters
from llama_stack_provider_moe.errors import AdapterError

VisionPart = Literal["projector", "tower"]
# Names of modules that turn the tower's output into the language model's input: mergers in Qwen's and GLM's towers
# (deep ones too), elsewhere a module beside the tower.
_PROJECTOR = re.compile(r"(^|\.)(\w*merger\w*|\w*projector\w*|connector|aligner|embed_vision)(\.|$)")
_SOUND = re.compile(r"(^|\.)\w*(audio|speech)\w*(\.|$)")


def vision_layers(model: nn.Module) -> dict[str, VisionPart]:
    """Full name (in the model without adapters) of each linear layer beside the language model -> its part."""
    base, outside = without_adapters(model), outside_text(model)
    return {
        name: part_of(name)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in outside and not _SOUND.search(name)
    }


def part_of(name: str) -> VisionPart:
    """The part that a module or parameter outside of the language model belongs to."""
    return "projector" if _PROJECTOR.search(name) else "tower"


def wanted_layers(model: nn.Module, vision: str) -> dict[str, VisionPart]:
    """The layers that `adapter.vision` asks for.

    Raises:
        AdapterError: the model has none.
    """
    found = vision_layers(model)
    if not found:
        raise AdapterError(f"adapter.vision: {vision!r} is not valid for this model: it has no vision tower")
    chosen = {name: part for name, part in found.items() if vision == "tower" or part == "projector"}
    if not chosen:
        raise AdapterError(f"adapter.vision: {vision!r} is not valid for this model: no linear layer of a projector "
                           "was found; expected 'off' or 'tower'")  # fmt: skip
    return chosen


def trained_text(model: nn.Module) -> str | None:
    """A line on how many parameters of tower and projector train; None for a model without."""
    outside = outside_text(model)
    if not outside:
        return None
    whole: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in without_adapters(model).named_parameters():
        if name in outside:
            part = part_of(name)
            whole[part] += 0 if ".lora_" in name else parameter.numel()
            trained[part] += parameter.numel() if parameter.requires_grad else 0
    return ", ".join(f"{part} of {whole[part]:,} parameters: {trained[part]:,} train" for part in sorted(whole))
