"""`adapter.init_from`: a fresh adapter takes every tensor of another adapter, or the job fails.

The server has already checked what the files show (`control.server.adapter_start`); this module checks against the
loaded model. The base does not change: with the adapter off, which is the reference of DPO and of circuit breakers, the
other adapter has no effect.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from llama_stack_provider_moe.compute.models.rope import Extension, extension_of, read_beside
from llama_stack_provider_moe.compute.models.saved_weights import restore_weights
from llama_stack_provider_moe.compute.moe.adapters import ADAPTER_NAME, EXPERT_RANKS, expert_ranks
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS, Steering
from llama_stack_provider_moe.errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 3


def start_from(model: PeftModel, folder: Path, steering: Steering | None, moves_biases: bool) -> str:
    """Load the weights in `folder` into the LoRA of `model`, which is fresh and complete in this process.

    Args:
        model: with LoRA on everything that trains.
        folder: an adapter that PEFT can read.
        steering: of the model's routers.
        moves_biases: whether the job balances with router biases (`aux_free`), so that it takes the saved ones too.

    Returns:
        A note for the adapter's report.

    Raises:
        AdapterError: the two adapters differ in a target, a rank, an expert's rank or a scale; it names each kind.
        CheckpointError: the router biases belong to another model.
    """
    weights, ranks = _read(folder)
    names = names_in_file(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    here = {names[own]: tuple(tensor.shape) for own, tensor in state.items()}
    problems = _differences(here, weights)
    if not problems:
        of_job = {names[own]: each for own, each in expert_ranks(model).items()}
        problems = _unequal_ranks(of_job, ranks) + _unequal_scales(model, folder)
    if (theirs := read_beside(folder)) != (mine := extension_of(model)):
        problems.append(f"it was trained with {_rope(theirs)}, this job has {_rope(mine)} (options.rope_scaling)")
    has_biases = (folder / ROUTER_BIAS).is_file()
    if has_biases and not moves_biases:
        problems.append(f"it has trained router biases ({ROUTER_BIAS}), which only sft with 'aux_free' can use")
    if problems:
        raise AdapterError(f"adapter.init_from: the adapter in {folder} does not match this job's: "
                           f"{'; '.join(problems)}")  # fmt: skip
    restore_weights(model, folder)
    if has_biases and steering is not None:
        steering.restore(folder)
    return f"starts from the adapter in {folder}, {len(weights)} tensors"


def _rope(change: Extension | None) -> str:
    return "the model's own context" if change is None else change.text()


def _read(folder: Path) -> tuple[Shapes, dict[str, list[int]]]:
    """The shape of each tensor by name, and the experts' ranks for the tensors that are padded with zeros."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            ranks = (file.metadata() or {}).get(EXPERT_RANKS, "{}")
        return shapes, dict(json.loads(ranks))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"adapter.init_from: {path} can't be read: {error}") from error


def _differences(here: Shapes, there: Shapes) -> list[str]:
    shared = here.keys() & there.keys()
    misshapen = sorted(f"{name} {there[name]} for {here[name]}" for name in shared if there[name] != here[name])
    kinds = {
        "{} weights of this job are not in it": sorted(here.keys() - there.keys()),
        "{} of its weights are not in this job": sorted(there.keys() - here.keys()),
        "{} weights have another shape (rank, or model)": misshapen,
    }
    return [
        f"{text.format(len(names))}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for text, names in kinds.items()
        if names
    ]


def _unequal_ranks(here: Mapping[str, list[int]], there: Mapping[str, list[int]]) -> list[str]:
    other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not other:
        return []
    name = other[0]
    return [f"experts have other ranks in {len(other)} weights: {name}: {there.get(name, 'all equal')} for "
            f"{here.get(name, 'all equal')}"]  # fmt: skip


def _unequal_scales(model: PeftModel, folder: Path) -> list[str]:
    """LoRA multiplies its product by alpha / rank (rsLoRA: by alpha / sqrt(rank)), which the weights do not show."""
    try:
        saved = json.loads((folder / CONFIG_NAME).read_bytes())
        theirs = {name: saved.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
        there = _scale(saved["lora_alpha"], saved["r"], bool(saved.get("use_rslora")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise AdapterError(f"adapter.init_from: {folder / CONFIG_NAME} can't be read: {error}") from error
    config = cast(LoraConfig, model.peft_config[ADAPTER_NAME])
    here = _scale(config.lora_alpha, config.r, config.use_rslora)
    found = []
    if not math.isclose(here, there):
        found.append(f"its scale is {there:g}, this job's {here:g} (alpha, rank, use_rslora)")
    for name, patterns in theirs.items():
        if dict(patterns) != dict(getattr(config, name) or {}):
            found.append(f"its {name} differs")
    return found


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)
