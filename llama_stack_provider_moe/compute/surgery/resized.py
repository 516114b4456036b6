"""What another number of experts changes in a model: keys of its config, and axes of its tensors.

Nothing is listed by family. The config's candidates are tried on a model without weights, and the tensors are those
whose shapes differ between the model before and the model after.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.derive import TOP_K_KEYS, find_layout
from llama_stack_provider_moe.compute.moe.experts_modules import find_experts
from llama_stack_provider_moe.compute.moe.layout import DOWN, ExpertLayout, text_config
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.errors import LayoutError, ModelError, shorten
from llama_stack_provider_moe.ground.small_files import read_config

# Parts of the names of keys that count something else than the routed experts of a layer.
_OTHER_COUNTS = ("shared", "per_tok", "group", "layer", "zero")
# Layers behind the last one that only guess tokens ahead; transformers reads none of their tensors.
_AHEAD = "num_nextn_predict_layers"

Config = dict[str, Any]
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """The model in a folder, without weights: its config, modules and layout."""

    folder: Path
    raw: Config
    model: PreTrainedModel
    layout: ExpertLayout


@dataclass(frozen=True)
class Resized:
    """The same model with another number of experts.

    Attributes:
        before: the model as it is.
        layout: of the new model.
        raw: the new config.json.
        keys: dotted names of the keys that changed -> their new values.
        axes: parameter or buffer -> its axis that counts the experts.
    """

    before: Described
    layout: ExpertLayout
    raw: Config
    keys: Mapping[str, int]
    axes: Mapping[str, int]

    def config_text(self) -> str:
        """The new config.json."""
        return json.dumps(self.raw, indent=2) + "\n"

    def config(self) -> PreTrainedConfig:
        """The new config, as transformers reads it from the new folder."""
        return _config(self.before, self.raw)


def describe(folder: Path) -> Described:
    """Read the config of a model with experts; no weight is read.

    Raises:
        ModelError: the model can't be read, is quantised or is dense.
        LayoutError: its experts are not understood, or a token's id chooses them.
    """
    try:
        raw = read_config(folder / "config.json")
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: the config.json of {folder} can't be read: {_short(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("model: its weights are quantised; expected the 16-bit model")
    model = _blank(config)
    layout = find_layout(model)
    if layout is None:
        raise ModelError(f"model: {config.model_type!r} is a dense model; expected one with experts")
    if layout.by_token_layers:
        raise LayoutError(f"model: in layers {', '.join(map(str, layout.by_token_layers))} a token's id fixes its "
                          "experts by a table, which this version can't change")  # fmt: skip
    return Described(folder, raw, model, layout)


def resize(before: Described, experts: int, top_k: int | None = None) -> Resized:
    """Find what `experts` experts in each layer change; `top_k`: of the new model, default: as it is.

    Raises:
        LayoutError: the config has no key that counts the experts, or the new model is not understood.
    """
    raw, keys = _with_experts(before, experts)
    if top_k is not None and top_k != before.layout.top_k:
        raw, more = _with_top_k(before, raw, top_k)
        keys |= more
    if raw.get(_AHEAD):
        raw[_AHEAD] = keys[_AHEAD] = 0
    after = _blank(_config(before, raw))
    layout = find_layout(after)
    wanted = (experts, before.layout.top_k if top_k is None else top_k, before.layout.moe_layers)
    if layout is None or (layout.num_experts, layout.top_k, layout.moe_layers) != wanted:
        raise LayoutError(f"{before.layout.model_type}: a config with {experts} experts describes another model: "
                          f"{'a dense one' if layout is None else layout.text()}")  # fmt: skip
    return Resized(before, layout, raw, keys, _axes(before, after, experts))


def _with_experts(before: Described, experts: int) -> tuple[Config, dict[str, int]]:
    """The config with another number of experts, and the keys that changed."""
    old = before.layout.num_experts
    for raw in (before.raw, _whole(before)):
        paths = [path for path in _paths(raw, old) if "expert" in path[-1] and not _counts_others(path[-1])]
        alone = [path for path in paths if _experts_of(before, _changed(raw, {path: experts})) == experts]
        # Two names of the same count: transformers may read either, and other programs the other one.
        for chosen in (_with_aliases(before, paths, alone) if alone else [], paths):
            changed = _changed(raw, dict.fromkeys(chosen, experts))
            if chosen and _experts_of(before, changed) == experts:
                written = _changed(before.raw, dict.fromkeys(chosen, experts))
                return written, {".".join(path): experts for path in chosen}
    raise LayoutError(f"{before.layout.model_type}: no key of its config.json counts the {old} experts of a layer")


def _with_aliases(before: Described, paths: list[KeyPath], alone: list[KeyPath]) -> list[KeyPath]:
    names = text_config(before.model).attribute_map
    same = {names.get(path[-1], path[-1]) for path in alone}
    return [path for path in paths if path in alone or names.get(path[-1], path[-1]) in same]


def _with_top_k(before: Described, raw: Config, top_k: int) -> tuple[Config, dict[str, int]]:
    for source in (raw, _whole(before)):
        paths = [path for path in _paths(source, before.layout.top_k) if path[-1] in TOP_K_KEYS]
        if paths:
            return _changed(raw, dict.fromkeys(paths, top_k)), {".".join(path): top_k for path in paths}
    raise LayoutError(f"{before.layout.model_type}: no key of its config.json says how many experts a token has")


def _whole(before: Described) -> Config:
    """The config with its defaults: a key that a file leaves out has a place in it as well."""
    whole: Config = before.model.config.to_dict()
    return whole


def _counts_others(key: str) -> bool:
    return any(part in key for part in _OTHER_COUNTS)


def _paths(raw: Config, value: int, above: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of the keys that have this whole number."""
    for key, each in raw.items():
        if isinstance(each, dict):
            yield from _paths(each, value, (*above, key))
        elif type(each) is int and each == value:
            yield (*above, key)


def _changed(raw: Config, values: Mapping[KeyPath, int]) -> Config:
    made = copy.deepcopy(raw)
    for path, value in values.items():
        block = made
        for key in path[:-1]:
            block = block.setdefault(key, {})
        block[path[-1]] = value
    return made


def _config(before: Described, raw: Config) -> PreTrainedConfig:
    """The config as transformers will read it from the new folder: only its reader knows the spelling of infinity."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return type(before.model.config).from_pretrained(folder)


def _experts_of(before: Described, raw: Config) -> int | None:
    """The experts of each layer that a config describes; None if it describes no such model."""
    try:
        config = _config(before, raw)
        model = _blank(config)
        found = find_experts(model, text_config(model))
    except (ModelError, LayoutError, ValueError, TypeError, AssertionError):
        return None
    counts = set() if found is None else {int(each.get_parameter(DOWN).shape[0]) for each in found.modules.values()}
    return counts.pop() if len(counts) == 1 else None


def _axes(before: Described, after: PreTrainedModel, experts: int) -> dict[str, int]:
    """Parameter or buffer -> the axis that differs."""
    old, new = before.model.state_dict(), after.state_dict()
    if set(old) != set(new):
        raise LayoutError(f"{before.layout.model_type}: the number of experts changes which tensors there are: "
                          f"{', '.join(sorted(set(old) ^ set(new))[:3])}")  # fmt: skip
    found: dict[str, int] = {}
    for name, tensor in old.items():
        if tensor.shape == new[name].shape:
            continue
        pairs = list(zip(tensor.shape, new[name].shape, strict=False))
        differ = [axis for axis, (one, other) in enumerate(pairs) if one != other]
        grown = experts - before.layout.num_experts
        sizes = (before.layout.num_experts, before.layout.choices)
        right = tensor.dim() == new[name].dim() and len(differ) == 1
        if not right or pairs[differ[0]][0] not in sizes or pairs[differ[0]][1] - pairs[differ[0]][0] != grown:
            raise LayoutError(f"{before.layout.model_type}: {name} of shape {tuple(tensor.shape)} would have shape "
                              f"{tuple(new[name].shape)}, which this version can't cut or extend")  # fmt: skip
        found[name] = differ[0]
    return found


def _blank(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return blank_model(config, torch.bfloat16)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model: it is not a causal language model that can be built here: {_short(error)}") from error


def _short(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 300)[1:-1]
