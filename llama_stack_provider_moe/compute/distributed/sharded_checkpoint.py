"""Checkpoints to which each process writes its own parts (`options.checkpoint_form: sharded`).

Nothing is gathered, so nothing has to fit into the memory of one process, and all processes write at the same time,
with torch's distributed checkpoints. You can resume with a different number of processes: each reads its own parts.

A checkpoint gets a folder `shards` with entries `weights/NAME` and `optimizer/NAME/KEY`, and a file from rank 0 with
the optimiser's groups, which are small.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llama_stack_provider_moe.compute.distributed.full_state import (
    State,
    leads,
    reshard,
    restore_optimizer,
    state_with_names,
)
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.ground import liveness

SHARDS = "shards"
GROUPS = "optimizer_groups.pt"


class _CountedSave(DefaultSavePlanner):
    """Gives a sign of life for each tensor that it writes."""

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """Torch calls this before it writes a tensor."""
        liveness.alive()
        return super().resolve_data(write_item)


class _CountedLoad(DefaultLoadPlanner):
    """Gives a sign of life for each tensor that it has read."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Torch calls this after it has read a tensor."""
        liveness.alive()
        super().commit_tensor(read_item, tensor)


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written in parts."""
    return (folder / SHARDS).is_dir()


def write_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write a checkpoint's weights and optimiser state into `folder`. All processes must call this."""
    tensors = _weights(model)
    saved = state_with_names(model, optimizer)
    for group in saved["param_groups"]:
        for name, number in zip(group["names"], group["params"], strict=True):
            entry = saved["state"].get(number, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in entry.items()}
    with _no_warning_for_one_process():
        save(
            dict(tensors), checkpoint_id=folder / SHARDS, planner=_CountedSave(),
            no_dist=not distributed.is_initialized(),
        )  # fmt: skip
    if leads():
        torch.save(saved["param_groups"], folder / GROUPS)


def read_weights(model: nn.Module, folder: Path) -> None:
    """Restore a checkpoint's weights into `model`; each process reads its parts. All processes must call this.

    Raises:
        CheckpointError: a name or a shape differs between the checkpoint and the model.
    """
    tensors = _weights(model)
    there = {name: entry for name, entry in _entries(folder).items() if name.startswith("weights/")}
    shapes = {name: entry.size for name, entry in there.items()}
    if wrong := sorted({*shapes.items()} ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        names = sorted({name.removeprefix("weights/") for name, _ in wrong})
        raise CheckpointError(
            f"{folder / SHARDS} belongs to another model: {len(names)} weights differ ({', '.join(names[:3])})"
        )
    _read(tensors, folder)


def read_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore a checkpoint's optimiser state; each process reads its parts. All processes must call this.

    Raises:
        CheckpointError: the state belongs to other weights.
    """
    reshard(model)
    groups: list[State] = torch.load(folder / GROUPS, weights_only=True)
    numbers = {name: number for group in groups for name, number in zip(group["names"], group["params"], strict=True)}
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for entry_name, entry in _entries(folder).items():
        kind, _, rest = entry_name.partition("/")
        if kind != "optimizer":
            continue
        name, _, key = rest.rpartition("/")
        parameter, dtype = parameters.get(name), entry.properties.dtype
        tensors[entry_name] = (
            torch.empty_like(parameter.detach(), dtype=dtype)
            if parameter is not None and entry.size == parameter.shape
            else torch.empty(entry.size, dtype=dtype)
        )
        state.setdefault(numbers[name], {})[key] = tensors[entry_name]
    _read(tensors, folder)
    restore_optimizer(model, optimizer, {"state": state, "param_groups": groups})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint contains; tied ones appear once."""
    reshard(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (f"weights/{name}", tensor.detach()))
    return dict(found.values())


def _entries(folder: Path) -> Mapping[str, TensorStorageMetadata]:
    entries = FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    with _no_warning_for_one_process():
        load(
            dict(tensors), checkpoint_id=folder / SHARDS, planner=_CountedLoad(),
            no_dist=not distributed.is_initialized(),
        )  # fmt: skip


@contextmanager
def _no_warning_for_one_process() -> Iterator[None]:
    """Torch warns if there is only one process, which is allowed here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
