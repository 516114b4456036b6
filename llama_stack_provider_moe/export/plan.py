"""What each tensor of a merged model is made of, decided from names and shapes before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_stack_provider_moe.errors import AdapterError, ModelError, shorten
from llama_stack_provider_moe.export.places import Place, find_places
from llama_stack_provider_moe.export.tensors import Entry, read_model
from llama_stack_provider_moe.export.updates import Updates, read_biases

_MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Plan:
    """What each tensor of the output is made of; one of `places`, `biases`, or neither of them."""

    entries: list[Entry]
    updates: Updates
    places: dict[str, Place]
    biases: dict[str, Entry]
    dtype: torch.dtype | None

    def written(self, entry: Entry) -> Entry:
        """`entry` in the dtype that it gets. Vectors keep theirs: routers' biases and states' decays need it."""
        convert = self.dtype is not None and entry.dtype.is_floating_point and len(entry.shape) > 1
        return entry.in_dtype(self.dtype) if convert and self.dtype is not None else entry


def make_plan(folder: Path, adapter: Path, dtype: torch.dtype | None) -> Plan:
    """Find a use for every tensor of the adapter, or say which has none.

    Raises:
        ModelError: the base can't be read, is quantised, or lacks what the adapter was made for.
        AdapterError: the adapter can't be read, or has what can't be merged.
    """
    model = _blank(folder)
    disk = read_model(folder)
    shapes = {name: entry.shape for name, entry in disk.items()}
    places = find_places(model, shapes)
    updates = Updates(adapter, model)
    made_of: dict[str, list[str]] = {}
    for name, place in places.items():
        made_of.setdefault(place.parameter, []).append(name)
    for parameter in updates.parameters:
        names = made_of.get(parameter, [])
        _check_tiling(parameter, updates.shapes[parameter], {name: (places[name], shapes[name]) for name in names})
        for name in names:
            if disk[name].dtype not in _MERGED_DTYPES:
                raise ModelError(f"base: {name} is stored as {disk[name].dtype}; expected 16 or 32 bits, not quantised")
    wanted = set(updates.parameters)
    biases: dict[str, Entry] = {}
    for parameter, bias in read_biases(adapter).items():
        names = made_of.get(parameter, [])
        if len(names) != 1 or places[names[0]] != Place(parameter) or shapes[names[0]] != bias.shape:
            raise AdapterError(f"adapter: the router's bias {parameter} {bias.shape} has no place in this base")
        biases[names[0]] = bias
    return Plan(
        entries=list(disk.values()), updates=updates, biases=biases, dtype=dtype,
        places={name: place for name, place in places.items() if place.parameter in wanted},
    )  # fmt: skip


def _blank(folder: Path) -> Any:
    """The base without its weights, for names and shapes."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError("base: its weights are quantised; give the 16-bit model that the adapter was trained on")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        raise ModelError(f"base: {folder} is no causal language model that can be built here: {text}") from error


def _check_tiling(parameter: str, shape: tuple[int, ...], found: dict[str, tuple[Place, tuple[int, ...]]]) -> None:
    """The tensors on disk make up the parameter, the whole of it, and no piece twice."""
    if not found:
        raise ModelError(f"base: {parameter} has LoRA, and no tensor of the base's files is it")
    if unknown := sorted({place.unknown for place, _ in found.values()} - {""}):
        raise ModelError(f"base: {parameter} is stored in a way that can't be merged into here ({unknown[0]})")
    pieces_of: dict[int | None, list[tuple[int, tuple[int, ...]]]] = {}
    for place, piece in found.values():
        pieces_of.setdefault(place.expert, []).append((place.first_row, piece))
    whole = shape if None in pieces_of else shape[1:]
    right = set(pieces_of) == ({None} if None in pieces_of else set(range(shape[0])))
    for each in pieces_of.values():
        end = 0
        for first_row, piece in sorted(each):
            right &= first_row == end and len(piece) == len(whole) and piece[1:] == whole[1:]
            end += piece[0] if piece else 0
        right &= end == whole[0]
    if not right:
        raise ModelError(
            f"base: {', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else ''} do not make up {parameter} of "
            f"shape {shape}"
        )
