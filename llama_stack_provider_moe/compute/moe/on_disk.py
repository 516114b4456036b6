"""The names that a layer's routers and experts have in a saved model, by transformers' checkpoint conversion.

Memory and disk differ: transformers 5 fuses the experts of a layer into 3-D parameters and renames modules when it
loads a model, and undoes both when it saves it (`transformers/conversion_mapping.py`).
"""

import re
from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, bare_name, without_adapters
from llama_stack_provider_moe.compute.moe.model_types import blank_model

# Parameter in memory (path below its layer) -> names of its parts on disk, in the order in which they are joined.
OnDisk = Mapping[str, tuple[str, ...]]


def names_on_disk(model: nn.Module, layout: ExpertLayout) -> OnDisk:
    """Each tensor of routers and experts -> the names of its parts, with `{expert}` where there is one for each.

    Args:
        model: the model; no weight is read.
        layout: where its experts are.
    """
    base = without_adapters(model)
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        # Qwen3-VL-MoE's conversion looks weights up by name, and PEFT's layers hide them.
        with torch.device("meta"):
            base = blank_model(type(base.config).from_dict(base.config.to_dict()))
    root = layout.path(layout.moe_layers[-1], "")
    inside = tuple(f"{root}.{path}." for path in (layout.router_path, layout.experts_path))
    bias = f"{root}.{layout.bias_path}"
    found: dict[str, tuple[str, ...]] = {}
    for name, tensor in base.state_dict().items():
        plain = bare_name(name)
        if (plain.startswith(inside) or plain == bias) and "lora_" not in plain:
            blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            parts = revert_weight_conversion(base, {plain: blank})
            found[plain.removeprefix(f"{root}.")] = tuple(_templates(list(parts)))
    return found


def _templates(names: list[str]) -> list[str]:
    """Paths below a layer: one for each part, in which a number of an expert is `{expert}`."""
    below = [re.sub(r"^.*?\.\d+\.", "", name) for name in names]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".{expert}.", name) for name in below))
