"""A model's tensors in pieces of one matrix, and the edit of a piece, in memory that is used again for the next.

New memory for each matrix costs more than the arithmetic: the kernel has to find and clear its pages. So an editor has
one matrix in fp32, and two in the tensors' dtype, because one is written while the next is edited.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llama_stack_provider_moe.compute.ablation.edits import Edit
from llama_stack_provider_moe.compute.export.tensors import TensorEntry
from llama_stack_provider_moe.compute.methods.ablation import (
    norms_along,
    remove_from_bias,
    remove_input,
    remove_output_,
)
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec.ablation import AblationPlan


@dataclass
class Figures:
    """Sums of squares over the matrices of a tensor."""

    before: float = 0.0
    after: float = 0.0
    along_before: float = 0.0
    along_after: float = 0.0

    def add_before(self, old: Tensor, unit_H: Tensor) -> None:
        """Add a matrix whose rows are what it writes."""
        whole, along = norms_along(old, unit_H)
        self.before += whole**2
        self.along_before += along**2

    def add_after(self, new: Tensor, unit_H: Tensor) -> None:
        """Add what a matrix became."""
        whole, along = norms_along(new, unit_H)
        self.after += whole**2
        self.along_after += along**2


@dataclass(frozen=True)
class Piece:
    """A matrix or vector on disk, alone or one of a stack; stacked biases come at once.

    Attributes:
        entry: where it is; of a stack, the part of it.
        edit: of its tensor; None: it is copied.
    """

    entry: TensorEntry
    edit: Edit | None


def pieces_of(entry: TensorEntry, edit: Edit | None) -> Iterator[Piece]:
    """All of a tensor, in the order of its bytes."""
    if edit is None or len(entry.shape) < 3:
        yield Piece(entry, edit)
        return
    for expert in range(entry.shape[0]):
        chosen = edit.experts is None or expert in edit.experts
        yield Piece(entry.part(expert), edit if chosen else None)


def writing_rows(numbers: Tensor, edit: Edit) -> Tensor:
    """The numbers as a matrix whose rows belong to dimensions of the residual stream, (H, ..); shares their memory."""
    writer = edit.writer
    if writer.bias:
        return numbers.reshape(-1, numbers.shape[-1]).mT
    return numbers.mT if edit.columns or writer.kind == "router" else numbers


class Editor:
    """Edits one piece after the other.

    Attributes:
        figures: name of a tensor -> its figures.
    """

    def __init__(self, plan: AblationPlan, edits: dict[str, Edit], units: dict[str, Tensor]) -> None:
        """Set the memory aside.

        Args:
            plan: of the ablation.
            edits: name of a tensor -> its edit.
            units: name of a tensor -> its direction.
        """
        self.figures: dict[str, Figures] = {}
        self._plan, self._units = plan, units
        shapes = [(edit.entry.dtype, prod(edit.entry.shape[-2:])) for edit in edits.values()]
        self._numbers = torch.empty(max((count for _, count in shapes), default=0))
        most = max((dtype.itemsize * count for dtype, count in shapes), default=0)
        self._stored = [torch.empty(most, dtype=torch.uint8) for _ in range(2)]

    def edited(self, piece: Piece) -> Tensor:
        """Read a piece that has an edit, and return it in its dtype without the direction.

        The result's memory is used again for the piece after the next.

        Raises:
            ModelError: it is not finite.
        """
        entry, edit = piece.entry, piece.edit
        assert edit is not None
        self._stored.reverse()
        stored = self._stored[0][: entry.nbytes].view(entry.dtype).view(entry.shape)
        entry.read_into(stored)
        numbers = self._numbers[: prod(entry.shape)].view(entry.shape).copy_(stored)
        unit_H = self._units[entry.name].to(numbers.dtype)
        figures, rows = self.figures.setdefault(entry.name, Figures()), writing_rows(numbers, edit)
        figures.add_before(rows, unit_H)
        self._remove(numbers, edit, unit_H)
        stored.copy_(numbers)
        figures.add_after(writing_rows(numbers.copy_(stored), edit), unit_H)
        # The sum of squares is looked at first, because looking at every number takes as long as the edit.
        if not math.isfinite(figures.after) and not bool(torch.isfinite(stored).all()):
            raise ModelError(f"model: {entry.name} is not finite after the edit, or was not before")
        return stored

    def _remove(self, numbers: Tensor, edit: Edit, unit_H: Tensor) -> None:
        scale = edit.layers.scale
        if edit.writer.kind == "router":
            numbers.copy_(remove_input(numbers, unit_H, self._plan.gate_scale * scale))
        elif edit.writer.bias:
            # A bias, (H,), or those of all experts, (E, H).
            for expert, row_H in enumerate(numbers.view(-1, numbers.shape[-1])):
                if edit.experts is None or expert in edit.experts:
                    row_H.copy_(remove_from_bias(row_H, unit_H, scale))
        else:
            remove_output_(numbers.mT if edit.columns else numbers, unit_H, scale, self._plan.norm_preserving)
