"""For each tensor on disk, the parameter in memory that it is a piece of, by transformers' checkpoint conversion.

transformers 5.23 stacks the experts of a layer when it loads a model, and renames modules (`conversion_mapping.py`).
This module reads that mapping; operations that it does not know are reported by name, not guessed.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
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
        swapped: the matrix on disk, or each of a stack, has its axes swapped.
        interleaved: rows on disk take turns: 0, 2, 4, ... are the first half in memory, 1, 3, 5, ... the second.
        unknown: conversion operations that this module does not support; empty if it supports all.
    """

    parameter: str
    expert: int | None = None
    first_row: int = 0
    swapped: bool = False
    interleaved: bool = False
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
    if not any(isinstance(each, MergeModulelist | ErnieFuseAndSplitTextVisionExperts) for each in converter.operations):
        return _whole_pieces(parameter, shape, converter, by_source, disk)
    # Ernie VL: the experts of two parameters in one list, one after the other; the name is that of the first.
    first, *others = converter.target_patterns
    parameters = [parameter, *(parameter.replace(first, other, 1) for other in others)]
    first_row = 0
    for pattern in converter.source_patterns:
        each = by_source.get(pattern, [])
        experts = ceil(len(each) / len(parameters))
        for at, name in enumerate(each):
            found[name] = TensorPlace(parameters[at // experts], at % experts, first_row)
        first_row += disk[each[0]][0] if each else 0
    return found


def _whole_pieces(
    parameter: str,
    shape: Shape,
    converter: WeightConverter,
    by_source: Mapping[str, list[str]],
    disk: Mapping[str, Shape],
) -> dict[str, TensorPlace]:
    """Places of tensors that are not stacked from one for each expert: rows joined or interleaved, or axes swapped."""
    operation = converter.operations[0]
    names = [name for pattern in converter.source_patterns for name in by_source.get(pattern, [])]
    if isinstance(operation, Transpose):
        # Some models take either order (`check_dims`), and transformers goes by the shapes, as here.
        return {name: TensorPlace(parameter, swapped=not operation.check_dims or disk[name] != shape) for name in names}
    if isinstance(operation, Interleave):
        return {name: TensorPlace(parameter, interleaved=True) for name in names}
    rows = [disk[name][-2] for name in names]
    return {name: TensorPlace(parameter, first_row=sum(rows[:at])) for at, name in enumerate(names)}


def _unknown(converter: WeightConverter) -> str:
    """Names of a converter's operations, unless this module supports them."""
    operations = list(converter.operations)
    known = _is_one_known(converter) if len(operations) == 1 else False
    if known or _stacks_and_joins(converter):
        return ""
    return ", ".join(type(each).__name__ for each in operations)


def _is_one_known(converter: WeightConverter) -> bool:
    """Whether the only operation joins or interleaves rows, swaps the axes of matrices, or splits a list in stacks."""
    (only,) = converter.operations
    if isinstance(only, ErnieFuseAndSplitTextVisionExperts):
        return (only.stack_dim, only.concat_dim) == (0, 1)
    if len(converter.target_patterns) > 1:
        return False
    # Rows are axis 0 of a matrix, and axis 1 of a stack of matrices.
    stacks = _of_stacks(converter)
    if isinstance(only, Concatenate | Interleave):
        return only.dim == (1 if stacks else 0) and not getattr(only, "inverse", False)
    return isinstance(only, Transpose) and {only.dim0, only.dim1} == ({1, 2} if stacks else {0, 1})


def _stacks_and_joins(converter: WeightConverter) -> bool:
    """Whether it stacks on axis 0, and joins rows of the matrices (axis 1) where it has several sources."""
    operations = list(converter.operations)
    known = [
        isinstance(each, kind) and each.dim == dim
        for each, (kind, dim) in zip(operations, ((MergeModulelist, 0), (Concatenate, 1)), strict=False)
    ]
    joins = len(operations) == 2
    return (
        bool(known)
        and all(known)
        and len(known) == len(operations)
        and len(converter.target_patterns) == 1
        and joins == (len(converter.source_patterns) > 1)
    )


def _of_stacks(converter: WeightConverter) -> bool:
    return ".experts" in converter.target_patterns[0]
