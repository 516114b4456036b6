"""The plan of a surgery on a folder: for each tensor of the new model, the pieces of old ones that it is made of.

Only names and shapes are read. A new expert is a sum of old ones with shares (`Blend`): one old expert with share 1 in
most surgeries. A `NewExpert` computes its parts when they are written.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.export.places import TensorPlace
from llama_stack_provider_moe.compute.export.tensors import TensorEntry
from llama_stack_provider_moe.compute.surgery.resized import Resized
from llama_stack_provider_moe.compute.surgery.slices import files_of, on_disk
from llama_stack_provider_moe.errors import ModelError

# A new expert: old experts and their shares.
Blend = tuple[tuple[int, float], ...]


class NewExpert(Protocol):
    """An expert that no sum of old ones gives."""

    def part(self, parameter: str) -> Tensor:
        """Its part of a parameter, in fp32 and in the form that it has in memory (see `slices`)."""


Expert = Blend | NewExpert
SURGERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """Numbers of an old tensor, from number `first` on, times `share`."""

    entry: TensorEntry
    first: int
    count: int
    share: float = 1.0


@dataclass(frozen=True)
class Computed:
    """`count` numbers that a new expert computes, in fp32."""

    numbers: Callable[[], Tensor]
    count: int


@dataclass(frozen=True)
class NewTensor:
    """One tensor of the new model.

    Attributes:
        entry: its name, dtype and shape; its file and offset are those of an old tensor and mean nothing.
        sums: one after the other; each is the sum of its pieces, which have equal counts, or computed.
        changed: False for a tensor that is copied as it is.
    """

    entry: TensorEntry
    sums: tuple[tuple[Piece, ...] | Computed, ...]
    changed: bool


@dataclass(frozen=True)
class SurgeryPlan:
    """Every tensor of the new model, in the order of the old files, and the old tensors that the model never had."""

    tensors: list[NewTensor]
    left_out: list[str]

    @property
    def parameters(self) -> int:
        """Numbers in the new tensors."""
        return sum(prod(each.entry.shape) for each in self.tensors)

    def parameters_before(self, resized: Resized) -> int:
        """Numbers in the old tensors of the same parameters."""
        unchanged: int = sum(prod(each.entry.shape) for each in self.tensors if not each.changed)
        state = resized.before.model.state_dict()
        changed: int = sum(state[name].numel() for name in resized.axes)
        return unchanged + changed

    @property
    def nbytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(each.entry.nbytes for each in self.tensors)


def left_out(plan: SurgeryPlan) -> list[str]:
    """A warning about tensors that are not in the new model; empty if all are."""
    if not plan.left_out:
        return []
    return [f"{len(plan.left_out)} tensors are left out, because the model does not have them by its config (such as "
            f"layers that guess tokens ahead): {', '.join(plan.left_out[:_SHOWN])}"]  # fmt: skip


def single(experts: Sequence[int]) -> tuple[Blend, ...]:
    """New experts that are old ones.

    >>> single([0, 2])
    (((0, 1.0),), ((2, 1.0),))
    """
    return tuple(((expert, 1.0),) for expert in experts)


def experts_of(
    resized: Resized, experts: Mapping[int, Sequence[Expert]], parameter: str, size: int
) -> list[Expert]:  # fmt: skip
    """The new entries of an axis of a parameter; choices behind the experts, which compute nothing, stay behind them.

    Args:
        resized: the model, and what changes in it.
        experts: layer with experts -> its new experts.
        parameter: its name.
        size: the old length of the axis.
    """
    layout = resized.before.layout
    layer = int(parameter.removeprefix(f"{layout.layers_path}.").partition(".")[0])
    return [*experts[layer], *single(range(layout.num_experts, size))]


def plan_tensors(resized: Resized, experts: Mapping[int, Sequence[Expert]]) -> SurgeryPlan:
    """Find the source of each new tensor.

    Args:
        resized: the model, and what changes in it.
        experts: layer with experts -> its new experts, in their new order.

    Raises:
        ModelError: the weights can't be read, are quantised, lack a tensor, or are stored in an unknown form.
    """
    folder, model = resized.before.folder, resized.before.model
    files = files_of(folder, model)
    disk, places = files.disk, files.places
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    planner = _Planner(resized, experts, disk, places)
    tensors: list[NewTensor] = []
    left_out: list[str] = []
    for name, entry in disk.items():
        place = places[name]
        if place.parameter not in known:
            left_out.append(name)
        elif place.parameter not in resized.axes:
            tensors.append(NewTensor(entry, ((Piece(entry, 0, prod(entry.shape)),),), changed=False))
        elif place.expert is None:
            tensors.append(planner.stack(entry, place))
        elif place.expert == 0:  # the new tensors of all experts stand where the old ones began
            tensors += planner.separate(entry, place)
    missing = sorted(set(resized.axes) - {place.parameter for place in places.values()})
    if missing:
        raise ModelError(f"model: its files have no tensor for {', '.join(missing[:_SHOWN])}")
    return SurgeryPlan(tensors, left_out)


class _Planner:
    """Finds the pieces of the tensors that change."""

    def __init__(
        self,
        resized: Resized,
        experts: Mapping[int, Sequence[Expert]],
        disk: Mapping[str, TensorEntry],
        places: Mapping[str, TensorPlace],
    ) -> None:
        self._resized = resized
        self._experts = experts
        self._disk = disk
        self._shapes = {name: tuple(each.shape) for name, each in resized.before.model.state_dict().items()}
        # (parameter, first row) -> expert -> the name of its tensor
        self._one_by_one: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        for name, place in places.items():
            if place.parameter in resized.axes and place.expert is not None:
                self._one_by_one[place.parameter, place.first_row][place.expert] = name

    def stack(self, entry: TensorEntry, place: TensorPlace) -> NewTensor:
        """A tensor with all experts on one axis."""
        self._check(entry, place)
        axis = self._axis(entry, place)
        blends = self._blends(place.parameter, entry.shape[axis])
        inside = prod(entry.shape[axis + 1 :])
        size, outers = entry.shape[axis], prod(entry.shape[:axis])
        sums = tuple(
            tuple(Piece(entry, (outer * size + old) * inside, inside, share) for old, share in blend)
            if isinstance(blend, tuple)
            else _computed(blend, place, inside, outer, outers)
            for outer in range(outers)
            for blend in blends
        )
        shape = (*entry.shape[:axis], len(blends), *entry.shape[axis + 1 :])
        return NewTensor(replace(entry, shape=shape), sums, changed=True)

    def separate(self, entry: TensorEntry, place: TensorPlace) -> list[NewTensor]:
        """The tensors of all experts that are stored one by one, from that of expert 0."""
        names = self._one_by_one[place.parameter, place.first_row]
        count = self._shapes[place.parameter][0]
        if sorted(names) != list(range(count)):
            raise ModelError(f"model: its files have {entry.name} and others for {len(names)} of the {count} experts "
                             f"of {place.parameter}")  # fmt: skip
        name_of = _Numbered(names[0], names[1])
        made = []
        for new, blend in enumerate(self._blends(place.parameter, count)):
            named = replace(entry, name=name_of(new))
            if not isinstance(blend, tuple):
                self._check(entry, place)
                computed = _computed(blend, place, prod(entry.shape), 0, 1)
                made.append(NewTensor(named, (computed,), changed=True))
                continue
            parts = [(self._disk[names[old]], share) for old, share in blend]
            for part, _ in parts:
                self._check(part, place)
                if part.shape != entry.shape or part.dtype != entry.dtype:
                    raise ModelError(f"model: {part.name} has shape {part.shape}, and {entry.name} {entry.shape}")
            pieces = tuple(Piece(part, 0, prod(part.shape), share) for part, share in parts)
            made.append(NewTensor(named, (pieces,), changed=True))
        return made

    def _blends(self, parameter: str, size: int) -> list[Expert]:
        return experts_of(self._resized, self._experts, parameter, size)

    def _axis(self, entry: TensorEntry, place: TensorPlace) -> int:
        """The axis on disk, where the last two may be swapped."""
        axis, shape = self._resized.axes[place.parameter], self._shapes[place.parameter]
        last = len(shape) - 1
        if place.swapped and axis >= last - 1:
            axis = last - 1 if axis == last else last
        size = shape[self._resized.axes[place.parameter]]
        if len(entry.shape) != len(shape) or entry.shape[axis] != size:
            raise ModelError(f"model: {entry.name} has shape {entry.shape}; expected {size} experts on axis {axis}")
        return axis

    def _check(self, entry: TensorEntry, place: TensorPlace) -> None:
        if entry.dtype not in SURGERY_DTYPES:
            raise ModelError(f"model: {entry.name} is stored as {entry.dtype}; expected 16 or 32 bits, not quantised")
        if place.unknown:
            raise ModelError(f"model: {entry.name} is stored in a form that can't be edited here ({place.unknown})")


def _computed(expert: NewExpert, place: TensorPlace, count: int, outer: int, outers: int) -> Computed:
    """Numbers `outer` * `count` and following of a new expert's part, as the files have them."""

    def numbers() -> Tensor:
        part = expert.part(place.parameter)
        found = part.reshape(outers, -1)[outer] if outers > 1 else on_disk(part, place, count)
        assert found.numel() == count, f"{place.parameter}: {found.numel()} numbers, expected {count}"
        return found

    return Computed(numbers, count)


class _Numbered:
    """The name of an expert's tensor by the expert's number, from the names of experts 0 and 1."""

    def __init__(self, of_first: str, of_second: str) -> None:
        self._parts = of_first.split(".")
        second = of_second.split(".")
        differ = [at for at, (one, other) in enumerate(zip(self._parts, second, strict=False)) if one != other]
        if len(second) != len(self._parts) or len(differ) != 1 or self._parts[differ[0]] != "0":
            raise ModelError(f"model: the names {of_first} and {of_second} do not differ by an expert's number alone")
        self._at = differ[0]

    def __call__(self, expert: int) -> str:
        return ".".join([*self._parts[: self._at], str(expert), *self._parts[self._at + 1 :]])
