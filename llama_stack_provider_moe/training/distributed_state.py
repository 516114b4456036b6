"""Weights and optimiser state of a model whose parameters processes share out, as one process has them, and back.

Such a parameter is a DTensor: FSDP2's, or experts that lie apart. What is written down is whole: a file is the same
whichever processes wrote it, and any number of processes go on from it. To make it whole all take part, a tensor at a
time, and rank 0 alone keeps it, on the CPU. To take a part of what is whole nobody needs another process: each reads
the file, and of each tensor what is its own.

Everything here leaves plain tensors as they are, so it does for models of one process too.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.experts.sharding import ShardedExperts

NAMES = "names"  # of an optimiser group's parameters, in their order


def is_shared_out(model: nn.Module) -> bool:
    """Whether any parameter of `model` lies in parts in several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def put_away(model: nn.Module) -> None:
    """Have each process hold its parts alone; FSDP2 leaves the last layers whole after a pass without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor | None:
    """The tensor, on the CPU, in rank 0; None in the others. All processes must call it, for the same tensors."""
    if isinstance(tensor, DTensor):
        kind = tensor.device_mesh.device_type
        # What is offloaded goes to its device for that: NCCL moves nothing that lies on the CPU.
        tensor = cast(DTensor, tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()
    return tensor.detach().cpu() if leads() else None


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `value`, which is whole, shared out as `like` is; itself where that isn't, or it is.

    Raises:
        ValueError: they differ in shape.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    if value.shape != like.shape:
        raise ValueError(f"a tensor {tuple(value.shape)} can't be shared out as one of {tuple(like.shape)} is")
    # Without a source rank each process cuts its own part out of its own copy, and nothing is sent.
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return part.to(like.device)


def model_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of `model.state_dict()` whole, in rank 0; nothing in the others. All processes must call it.

    Tied weights are one tensor under several names, as in the model.

    Args:
        model: all parts of it together.
        dtype: to have its parameters in; None: their own.
    """
    put_away(model)
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor | None] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            casts = dtype is not None and isinstance(tensor, nn.Parameter)
            gathered[id(tensor)] = whole(tensor.detach().to(dtype) if casts else tensor)
        one = gathered[id(tensor)]
        if one is not None:
            found[name] = one
    return found


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, experts: ShardedExperts | None = None
) -> dict[str, Any]:
    """`optimizer.state_dict()`, whole, in rank 0; the others' is not complete. All processes must call it.

    Each group also has the names of its parameters: groups differ with how the parameters are shared out, and with
    them a parameter's number.

    Args:
        experts: that processes hold apart; their parameters are plain tensors.
    """
    saved = names_of_groups(model, optimizer)
    by_number = {
        number: name
        for group in saved["param_groups"]
        for number, name in zip(group["params"], group[NAMES], strict=True)
    }
    saved["state"] = {
        number: {key: _whole_entry(by_number[number], value, experts) for key, value in entry.items()}
        for number, entry in sorted(saved["state"].items())
    }
    return saved


def names_of_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` as this process has it, with the names of each group's parameters."""
    put_away(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved: dict[str, Any] = optimizer.state_dict()
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        saved_group[NAMES] = [names[parameter] for parameter in group["params"]]
    return saved


def _whole_entry(name: str, value: Any, experts: ShardedExperts | None) -> Any:
    """Of one parameter's state; what has no dimension (Adam's count of steps) is every process's."""
    if not isinstance(value, Tensor):
        return value
    if experts is not None and value.dim() and experts.covers(name):
        return experts.gathered(name, value)
    return whole(value)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], experts: ShardedExperts | None = None
) -> None:
    """Give `optimizer` the state that `optimizer_state` or a plain `state_dict()` has written, each process its part.

    Args:
        saved: read in every process; of a file that is mapped into memory only what is a process's own is copied.
        experts: as of `optimizer_state`.

    Raises:
        CheckpointError: it is of other parameters.
    """
    put_away(model)
    there = _by_name(model, optimizer, saved)
    names = {parameter: name for name, parameter in model.named_parameters()}
    here = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    if strange := here ^ there.keys():
        raise CheckpointError(
            f"the optimiser's state is of other weights: {len(strange)} are in one of both only "
            f"({', '.join(sorted(strange)[:3])})"
        )
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in optimizer.param_groups:
        settings: Mapping[str, Any] = group
        first = number
        for parameter in group["params"]:
            settings, entry = there[names[parameter]]
            if entry:
                state[number] = _part_of_entry(names[parameter], entry, parameter, experts)
            number += 1
        kept = {key: value for key, value in settings.items() if key != NAMES}
        groups.append({**kept, "params": list(range(first, number))})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _part_of_entry(
    name: str, entry: Mapping[str, Any], parameter: Tensor, experts: ShardedExperts | None
) -> dict[str, Any]:
    """One parameter's state in this process."""

    def part(value: Tensor) -> Tensor:
        mine = part_of(value, parameter) if experts is None or not experts.covers(name) else experts.part(name, value)
        if mine.shape != parameter.shape:
            raise ValueError(f"a tensor {tuple(value.shape)} is none of a weight {tuple(parameter.shape)}")
        # A copy, for the file that it may be mapped from goes when a newer checkpoint is there.
        return mine.clone()

    try:
        return {key: part(value) if isinstance(value, Tensor) and value.dim() else value
                for key, value in entry.items()}  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"the optimiser's state of {name}: {error}") from error


def _by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]
) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Name of each parameter -> its group's settings, and its own state (empty before its first step)."""
    found = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for index, group in enumerate(saved["param_groups"]):
        if NAMES in group:
            members = group[NAMES]
        else:  # written before names were: by one process, or several that each had all, so groups are as here
            here = optimizer.param_groups[index : index + 1]
            members = [names[parameter] for each in here for parameter in each["params"]]
        if len(members) != len(group["params"]):
            raise CheckpointError(
                f"the optimiser's state has {len(group['params'])} weights in group {index}, not {len(members)}"
            )
        for name, number in zip(members, group["params"], strict=True):
            found[name] = (group, saved["state"].get(number, {}))
    return found


def leads() -> bool:
    """Whether this is the one process there is, or rank 0."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
