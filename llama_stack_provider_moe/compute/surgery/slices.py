"""One expert's part of a parameter: read from the files into the form that it has in memory, and turned back.

Shapes: E experts, I hidden neurons of an expert, H width of the residual stream. A part of `gate_up_proj` (E, 2I, H) is
(2I, H), of a router's matrix (E, H) it is (H,), and of a bias (E,) it is a number.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.export.places import TensorPlace, find_places
from llama_stack_provider_moe.compute.export.tensors import TensorEntry, read_model
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.surgery.resized import Described
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness

_BIAS = "_bias"
_COLUMNS = 1 << 16  # numbers of each expert that are compared at a time


@dataclass(frozen=True)
class Files:
    """The tensors in a model's folder, and where they are in memory."""

    disk: Mapping[str, TensorEntry]
    places: Mapping[str, TensorPlace]

    @cached_property
    def of_parameter(self) -> dict[str, list[str]]:
        """Parameter -> the names of its tensors, in the order of the rows that they hold."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, place in self.places.items():
            found[place.parameter].append(name)
        return {
            parameter: sorted(names, key=lambda name: self.places[name].first_row) for parameter, names in found.items()
        }


def files_of(folder: Path, model: PreTrainedModel) -> Files:
    """The files of a model that is in memory, or without weights."""
    disk = read_model(folder)
    return Files(disk, find_places(model, {name: entry.shape for name, entry in disk.items()}))


def read_part(files: Files, parameter: str, shape: tuple[int, ...], axis: int, expert: int) -> Tensor:
    """An expert's part of a parameter as in memory, in fp32.

    Args:
        files: of the model.
        parameter: its full name.
        shape: of the whole parameter in memory.
        axis: the one that counts the experts.
        expert: whose part.

    Raises:
        ModelError: the files have no such tensor, or store it in an unknown form.
    """
    rows: list[Tensor] = []
    for name in files.of_parameter.get(parameter, []):
        place, entry = files.places[name], files.disk[name]
        if place.unknown:
            raise ModelError(f"model: {name} is stored in a form that can't be read here ({place.unknown})")
        if place.expert is not None and place.expert != expert:
            continue
        rows.append(_in_memory(_stored(entry, place, axis, expert), place))
    wanted = (*shape[:axis], *shape[axis + 1 :])
    if not rows or sum(map(torch.numel, rows)) != prod(wanted):
        raise ModelError(f"model: its files do not have expert {expert} of {parameter} in shape {wanted}")
    return torch.cat(rows).view(wanted) if rows[0].dim() else rows[0]


def read_whole(files: Files, parameter: str) -> Tensor:
    """A matrix that is no stack of experts, as in memory and in fp32.

    Raises:
        ModelError: the files have no such tensor, or store it in an unknown form.
    """
    names = files.of_parameter.get(parameter, [])
    if not names or any(files.places[name].unknown for name in names):
        raise ModelError(f"model: its files do not have {parameter} in a form that can be read here")
    return torch.cat([_in_memory(files.disk[name].tensor().float(), files.places[name]) for name in names])


def _stored(entry: TensorEntry, place: TensorPlace, axis: int, expert: int) -> Tensor:
    """The part as it is in one tensor of the files."""
    if place.expert is not None:
        return entry.tensor().float()
    if axis == 0:
        inside = prod(entry.shape[1:])
        return entry.read(expert * inside, inside).float().view(entry.shape[1:])
    return entry.tensor().float().select(axis, expert)


def _in_memory(stored: Tensor, place: TensorPlace) -> Tensor:
    if place.swapped:
        return stored.mT
    return torch.cat([stored[0::2], stored[1::2]]) if place.interleaved else stored


def on_disk(part: Tensor, place: TensorPlace, count: int) -> Tensor:
    """The `count` numbers of an expert's part, as in memory, that belong to a tensor in the files, in their order.

    The inverse of what `read_part` does to each of them.
    """
    if part.dim() == 2:
        if place.swapped:
            part = part.mT
        if place.interleaved:
            part = torch.stack(part.chunk(2), dim=1)
    flat = part.reshape(-1)
    if flat.numel() == count:
        return flat
    columns = part.shape[-1]
    return flat[place.first_row * columns : place.first_row * columns + count]


class Reader:
    """Reads experts' parts of a model that is described, and knows how its experts are stored."""

    def __init__(self, before: Described, axes: Mapping[str, int]) -> None:
        self.layout: ExpertLayout = before.layout
        self._axes = axes
        self._files = files_of(before.folder, before.model)
        self._shapes = {name: tuple(each.shape) for name, each in before.model.state_dict().items()}
        experts = next(iter(before.layout.experts(before.model).values()))
        self._down = tuple(experts.get_parameter(before.layout.down).shape)
        # Undecorated experts (Llama 4) split gate and up in halves.
        self.turns = not getattr(experts, "is_concatenated", True)

    @property
    def neurons(self) -> int:
        """I, hidden neurons of an expert."""
        return self._down[1 if self.layout.transposed else 2]

    def of_layer(self, layer: int) -> list[str]:
        """The parameters of a layer's experts, without its router."""
        start = self.layout.path(layer, self.layout.experts_path) + "."
        return [name for name in self._axes if name.startswith(start)]

    def part(self, parameter: str, expert: int) -> Tensor:
        """See `read_part`."""
        return read_part(self._files, parameter, self._shapes[parameter], self._axes[parameter], expert)

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of an expert's part."""
        shape, axis = self._shapes[parameter], self._axes[parameter]
        return (*shape[:axis], *shape[axis + 1 :])

    def products(self, layer: int) -> Tensor:
        """Inner products (E, E) of the weights of a layer's experts, in fp64."""
        count = self.layout.num_experts
        total = torch.zeros(count, count, dtype=torch.float64)
        for name in self.of_layer(layer):
            weights_EF = torch.stack([self.part(name, expert).reshape(-1) for expert in range(count)])
            for start in range(0, weights_EF.shape[1], _COLUMNS):
                columns_EF = weights_EF[:, start : start + _COLUMNS].double()
                total += columns_EF @ columns_EF.mT
            liveness.alive()
        return total


def neuron_axis(parameter: str, layout: ExpertLayout) -> int | None:
    """The axis of an expert's part that counts hidden neurons; None: the part has none, such as a router's row."""
    name = parameter.rpartition(".")[2]
    if name == layout.gate_up:
        return 1 if layout.transposed else 0
    if name == layout.down:
        return 0 if layout.transposed else 1
    return 0 if name == layout.gate_up + _BIAS else None


def neurons_first(part: Tensor, parameter: str, layout: ExpertLayout, neurons: int, turns: bool) -> Tensor | None:
    """The weights of each hidden neuron, (I, ...); None where the part has none.

    Args:
        part: of a parameter, as in memory.
        parameter: its name.
        layout: of the model.
        neurons: I.
        turns: gate and up take turns on their axis, as in gpt-oss; else all gates come first.
    """
    axis = neuron_axis(parameter, layout)
    if axis is None:
        return None
    moved = part.movedim(axis, 0)
    if len(moved) == neurons:
        return moved.reshape(neurons, -1)
    halves = (moved[0::2], moved[1::2]) if turns else moved.chunk(2)
    return torch.cat([half.reshape(neurons, -1) for half in halves], dim=1)


def permuted(part: Tensor, parameter: str, layout: ExpertLayout, order_I: Tensor, turns: bool) -> Tensor:
    """The part with its hidden neurons in another order; an expert whose parts all are computes the same."""
    axis = neuron_axis(parameter, layout)
    if axis is None:
        return part
    size = len(order_I)
    if part.shape[axis] == size:
        return part.index_select(axis, order_I)
    both = (
        torch.stack([2 * order_I, 2 * order_I + 1], dim=1).view(-1) if turns else torch.cat([order_I, order_I + size])
    )
    return part.index_select(axis, both)
