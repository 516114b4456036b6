"""Plan the source of each tensor of a merged model, from names and shapes, before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from llama_stack_provider_moe.compute.export.places import TensorPlace, find_places
from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_model
from llama_stack_provider_moe.compute.export.updates import Updates, read_biases
from llama_stack_provider_moe.compute.moe.model_types import blank_model
from llama_stack_provider_moe.errors import AdapterError, ModelError, shorten

_MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MergePlan:
    """The source of each output tensor: merged (`places`), replaced (`biases`), or copied (neither)."""

    entries: list[TensorEntry]
    updates: Updates
    places: dict[str, TensorPlace]
    biases: dict[str, TensorEntry]
    dtype: torch.dtype | None

    def written(self, entry: TensorEntry) -> TensorEntry:
        """`entry` in its output dtype. Vectors keep theirs, because router biases and decays of states need it."""
        convert = self.dtype is not None and entry.dtype.is_floating_point and len(entry.shape) > 1
        return entry.in_dtype(self.dtype) if convert and self.dtype is not None else entry


def make_plan(folder: Path, adapter: Path, dtype: torch.dtype | None) -> MergePlan:
    """Find a place for every tensor of the adapter, or report the one that has none.

    Raises:
        ModelError: the base can't be read, is quantised, or lacks a tensor that the adapter changes.
        AdapterError: the adapter can't be read, or can't be merged.
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
        check_tiling(parameter, updates.shapes[parameter], {name: (places[name], shapes[name]) for name in names})
        for name in names:
            if disk[name].dtype not in _MERGED_DTYPES:
                raise ModelError(f"base: {name} is stored as {disk[name].dtype}; expected 16 or 32 bits, not quantised")
    wanted = set(updates.parameters)
    biases: dict[str, TensorEntry] = {}
    for parameter, bias in read_biases(adapter).items():
        names = made_of.get(parameter, [])
        if len(names) != 1 or places[names[0]] != TensorPlace(parameter) or shapes[names[0]] != bias.shape:
            raise AdapterError(f"adapter: the router's bias {parameter} {bias.shape} has no place in this base")
        biases[names[0]] = bias
    return MergePlan(
        entries=list(disk.values()), updates=updates, biases=biases, dtype=dtype,
        places={name: place for name, place in places.items() if place.parameter in wanted},
    )  # fmt: skip


def _blank(folder: Path) -> PreTrainedModel:
    """The base without weights, for names and shapes."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError("base: its weights are quantised; give the 16-bit model that the adapter was trained on")
        with torch.device("meta"):
            return blank_model(config, torch.float32)
    except (OSError, ValueError, ImportError) as error:
        text = shorten(" ".join(str(error).split()), 300)[1:-1]
        raise ModelError(f"base: {folder} is not a causal language model that can be built here: {text}") from error


def check_tiling(parameter: str, shape: tuple[int, ...], found: dict[str, tuple[TensorPlace, tuple[int, ...]]]) -> None:
    """Check that the tensors on disk form the whole parameter, with no piece twice."""
    if not found:
        raise ModelError(f"base: {parameter} has LoRA, but the base's files have no tensor for it")
    if unknown := sorted({place.unknown for place, _ in found.values()} - {""}):
        raise ModelError(f"base: {parameter} is stored in a form that can't be merged here ({unknown[0]})")
    pieces_of: dict[int | None, list[tuple[int, tuple[int, ...]]]] = {}
    stacked = len(shape) == 3
    for place, piece in found.values():
        if place.swapped:
            piece = (*piece[:-2], piece[-1], piece[-2])
        if place.expert is None and stacked and piece[:1] == shape[:1]:  # it has all experts: compare one
            piece = piece[1:]
        pieces_of.setdefault(place.expert, []).append((place.first_row, piece))
    whole = shape[1:] if stacked else shape
    right = set(pieces_of) == ({None} if None in pieces_of else set(range(shape[0])))
    for each in pieces_of.values():
        end = 0
        for first_row, piece in sorted(each):
            right &= first_row == end and len(piece) == len(whole) and piece[1:] == whole[1:]
            end += piece[0] if piece else 0
        right &= end == whole[0]
    if not right:
        raise ModelError(
            f"base: {', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else ''} do not form {parameter} of "
            f"shape {shape}"
        )
