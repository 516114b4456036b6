"""Which piece of which parameter in memory each tensor on disk is, by transformers' own conversion of checkpoints.

transformers 5.23 stacks the experts of a layer when it loads a model, and renames modules (`conversion_mapping.py`);
what it does is read off its mapping, and anything but stacking and joining is told by name, not guessed at.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the disk is in memory.

    Attributes:
        parameter: its full name in memory.
        expert: index on the parameter's first axis; None where it is the whole parameter.
        first_row: of the expert's matrix.
        unknown: what is done to it on the way that is not followed here; empty where it is known.
    """

    parameter: str
    expert: int | None = None
    first_row: int = 0
    unknown: str = ""


def find_places(model: PreTrainedModel, disk: Mapping[str, Shape]) -> dict[str, Place]:
    """Name of each tensor on disk -> its place in `model`, which may be on the meta device.

    Tensors that the model has no use for have places too, in parameters that it does not have.
    """
    in_memory = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, Place] = {}
    joined: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # The order in which transformers stacks.
    for name in sorted(disk, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if pattern is None:
            found[name] = Place(parameter)
        else:
            joined[parameter][pattern].append(name)
    for parameter, by_source in joined.items():
        found |= _joined(parameter, by_pattern[next(iter(by_source))], by_source, disk)
    return found


def _joined(
    parameter: str, converter: WeightConverter, by_source: Mapping[str, list[str]], disk: Mapping[str, Shape]
) -> dict[str, Place]:
    names = [name for each in by_source.values() for name in each]
    if unknown := _unknown(converter):
        return {name: Place(parameter, unknown=unknown) for name in names}
    found: dict[str, Place] = {}
    first_row = 0
    for pattern in converter.source_patterns:
        each = by_source.get(pattern, [])
        for expert, name in enumerate(each):
            found[name] = Place(parameter, expert, first_row)
        first_row += disk[each[0]][0] if each else 0
    return found


def _unknown(converter: WeightConverter) -> str:
    """Names of what a converter does, unless it is: stack on axis 0, then join rows of the matrices (axis 1)."""
    operations: list[Any] = list(converter.operations)
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
