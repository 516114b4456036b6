"""Gather the weights and the optimiser state of a sharded model into one process, and distribute them again.

A sharded parameter is a DTensor: FSDP2's, or experts of which each process has its own. Files contain whole tensors: a
file is the same whichever processes wrote it, and you can resume with any number of processes. All processes take part
in gathering, a tensor at a time, and only rank 0 keeps the result, on the CPU. To restore, a process needs no other:
each reads the file and takes its own part of each tensor.

These functions do not change plain tensors, so they also work for a model in one process.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.ground import liveness

NAMES = "names"  # key of an optimiser group: the names of its parameters, in order
State = dict[str, Any]  # an optimiser's `state_dict()`: tensors and settings in nested containers


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether any parameter of `model` is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the gathered weights; FSDP2 leaves the last layers whole after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor | None:
    """The whole tensor on the CPU in rank 0, None in the others. All processes must call this for the same tensors."""
    liveness.alive()
    if isinstance(tensor, DTensor):
        kind = tensor.device_mesh.device_type
        # An offloaded tensor goes to its device first: NCCL can't send a tensor on the CPU.
        tensor = cast(DTensor, tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()
    return tensor.detach().cpu() if leads() else None


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of the whole tensor `value`, sharded like `like`.

    Returns `value` itself if it is sharded already or if `like` is not sharded.

    Raises:
        ValueError: the shapes differ.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    if value.shape != like.shape:
        raise ValueError(f"a tensor {tuple(value.shape)} can't be sharded like one of {tuple(like.shape)}")
    # Without a source rank each process takes its part from its own copy, and nothing is sent.
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return part.to(like.device)


def model_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every whole tensor of `model.state_dict()` in rank 0, nothing in the others. All processes must call this.

    Tied weights are one tensor under several names, as in the model.

    Args:
        model: may be sharded.
        dtype: the dtype for its parameters; None keeps theirs.
    """
    reshard(model)
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor | None] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in liveness.counted("gathering weights", tensors.items(), len(tensors), "tensors"):
        if id(tensor) not in gathered:
            casts = dtype is not None and isinstance(tensor, nn.Parameter)
            gathered[id(tensor)] = whole(tensor.detach().to(dtype) if casts else tensor)
        one = gathered[id(tensor)]
        if one is not None:
            found[name] = one
    return found


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, experts: ShardedExperts | None = None) -> State:
    """`optimizer.state_dict()` with whole tensors in rank 0, incomplete in the others. All processes must call this.

    Each group also has the names of its parameters, because groups and the numbers of parameters depend on how the
    model is sharded.

    Args:
        model: its parameters give the names.
        optimizer: of the model.
        experts: the experts of which each process has its own; their parameters are plain tensors.
    """
    saved = state_with_names(model, optimizer)
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


def state_with_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """`optimizer.state_dict()` of this process, with the names of each group's parameters."""
    reshard(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    saved: State = optimizer.state_dict()
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        saved_group[NAMES] = [names[parameter] for parameter in group["params"]]
    return saved


def _whole_entry(name: str, value: object, experts: ShardedExperts | None) -> object:
    """One value of a parameter's state; a value without a dimension (Adam's step count) is equal in all processes."""
    if not isinstance(value, Tensor):
        return value
    if experts is not None and value.dim() and experts.covers(name):
        return experts.gathered(name, value)
    return whole(value)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: State, experts: ShardedExperts | None = None
) -> None:
    """Restore a state from `optimizer_state` or from a plain `state_dict()`; each process takes its part.

    Args:
        model: its parameters give the names.
        optimizer: of the model.
        saved: the state, which every process reads; from a memory-mapped file a process copies only its own part.
        experts: as for `optimizer_state`.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    reshard(model)
    there = _by_name(model, optimizer, saved)
    names = {parameter: name for name, parameter in model.named_parameters()}
    here = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    if different := here ^ there.keys():
        raise CheckpointError(
            f"the optimiser's state belongs to other weights: {len(different)} are only in the job or only in the "
            f"state ({', '.join(sorted(different)[:3])})"
        )
    state: dict[int, dict[str, object]] = {}
    groups: list[dict[str, object]] = []
    number = 0
    for group in optimizer.param_groups:
        settings: Mapping[str, object] = group
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
    name: str, entry: Mapping[str, object], parameter: Tensor, experts: ShardedExperts | None
) -> dict[str, object]:
    """This process's part of one parameter's state."""

    def part(value: Tensor) -> Tensor:
        liveness.alive()
        mine = part_of(value, parameter) if experts is None or not experts.covers(name) else experts.part(name, value)
        if mine.shape != parameter.shape:
            raise ValueError(f"a tensor {tuple(value.shape)} does not match a weight {tuple(parameter.shape)}")
        # A copy, because the mapped file is removed when there is a newer checkpoint.
        return mine.clone()

    try:
        return {key: part(value) if isinstance(value, Tensor) and value.dim() else value
                for key, value in entry.items()}  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"the optimiser's state of {name}: {error}") from error


def _by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: State
) -> dict[str, tuple[Mapping[str, object], Mapping[str, object]]]:
    """Each parameter's group settings and own state (empty before its first step), by the parameter's name."""
    found = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for index, group in enumerate(saved["param_groups"]):
        if NAMES in group:
            members = group[NAMES]
        else:  # an older file without names, of one process or of several that were not sharded: groups are as here
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
    """Whether this process is rank 0, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0
