"""For each tensor on disk, the parameter in memory that it is a piece of, by transformers' checkpoint conversion.

transformers 5.23 stacks the experts of a layer when it loads a model, and renames modules (`conversion_mapping.py`).
This module reads that mapping; operations other than stacking, joining and swapping the axes of stacked matrices are
reported by name, not guessed.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorPlace:
    """The place in memory of a tensor on disk.

    Attributes:
        parameter: full name of the parameter in memory.
        expert: index on the parameter's first axis; None: the tensor has all of that axis.
        first_row: first row within the matrix, of one expert or of each.
        swapped: a stack of matrices on disk has their axes swapped.
        unknown: conversion operations that this module does not support; empty if it supports all.
    """

    parameter: str
    expert: int | None = None
    first_row: int = 0
    swapped: bool = False
    unknown: str = ""


def find_places(model: PreTrainedModel, disk: Mapping[str, Shape]) -> dict[str, TensorPlace]:
    """Name of each tensor on disk -> its place in `model`, which may be on the meta device.

    Tensors that the model does not use get places too, in parameters that it does not have.
    """
    in_memory = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, TensorPlace] = {}
    joined: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # The order in which transformers stacks tensors.
    for name in sorted(disk, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if pattern is None:
            found[name] = TensorPlace(parameter)
        else:
            joined[parameter][pattern].append(name)
    for parameter, by_source in joined.items():
        shape = tuple(in_memory[parameter].shape) if parameter in in_memory else ()
        found |= _joined(parameter, shape, by_pattern[next(iter(by_source))], by_source, disk)
    return found


def _joined(
    parameter: str,
    shape: Shape,
    converter: WeightConverter,
    by_source: Mapping[str, list[str]],
    disk: Mapping[str, Shape],
) -> dict[str, TensorPlace]:
    names = [name for each in by_source.values() for name in each]
    if unknown := _unknown(converter):
        return {name: TensorPlace(parameter, unknown=unknown) for name in names}
    found: dict[str, TensorPlace] = {}
    if not any(isinstance(each, MergeModulelist) for each in converter.operations):
        return _whole_pieces(parameter, shape, converter, by_source, disk)
    first_row = 0
    for pattern in converter.source_patterns:
        each = by_source.get(pattern, [])
        for expert, name in enumerate(each):
            found[name] = TensorPlace(parameter, expert, first_row)
        first_row += disk[each[0]][0] if each else 0
    return found


def _whole_pieces(
    parameter: str,
    shape: Shape,
    converter: WeightConverter,
    by_source: Mapping[str, list[str]],
    disk: Mapping[str, Shape],
) -> dict[str, TensorPlace]:
    """Places of tensors that are not stacked from one for each expert: rows that are joined, or swapped axes."""
    operation = converter.operations[0]
    names = [name for pattern in converter.source_patterns for name in by_source.get(pattern, [])]
    if isinstance(operation, Transpose):
        # Some models take either order (`check_dims`), and transformers goes by the shapes, as here.
        return {name: TensorPlace(parameter, swapped=not operation.check_dims or disk[name] != shape) for name in names}
    rows = [disk[name][-2] for name in names]
    return {name: TensorPlace(parameter, first_row=sum(rows[:at])) for at, name in enumerate(names)}


def _unknown(converter: WeightConverter) -> str:
    """Names of a converter's operations, unless this module supports them.

    It supports: stack on axis 0, then join rows of the matrices (axis 1); join rows; swap the axes of stacked matrices.
    """
    operations = list(converter.operations)
    if len(operations) == len(converter.target_patterns) == 1:
        (only,) = operations
        # Rows are axis 0 of a matrix, and axis 1 of a stack of matrices.
        if isinstance(only, Concatenate) and (only.dim == 1) == _of_stacks(converter):
            return ""
        if isinstance(only, Transpose) and {only.dim0, only.dim1} == {1, 2}:
            return ""
    known = [
        isinstance(each, kind) and each.dim == dim
        for each, (kind, dim) in zip(operations, ((MergeModulelist, 0), (Concatenate, 1)), strict=False)
    ]
    joins = len(operations) == 2
    if (
        known
        and all(known)
        and len(known) == len(operations)
        and len(converter.target_patterns) == 1
        and joins == (len(converter.source_patterns) > 1)
    ):
        return ""
    return ", ".join(type(each).__name__ for each in operations)


def _of_stacks(converter: WeightConverter) -> bool:
    return ".experts" in converter.target_patterns[0]
