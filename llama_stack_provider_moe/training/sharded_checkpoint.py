"""Weights and optimiser state that each process writes its own parts of (`options.checkpoint_form: sharded`).

Nothing is gathered, so nothing has to fit into one process's memory, and all write at once, by torch's distributed
checkpoints. Whoever goes on from it, in this or in another number of processes, reads what is its own.

A folder `shards` beside what else a checkpoint holds, with entries `weights/NAME` and `optimizer/NAME/KEY`; and the
optimiser's groups, which are small, in a file of rank 0's.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.training.distributed_state import leads, names_of_groups, put_away, restore_optimizer

SHARDS = "shards"
GROUPS = "optimizer_groups.pt"


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's weights lie in parts."""
    return (folder / SHARDS).is_dir()


def write_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write a checkpoint's weights and optimiser state into `folder`. All processes must call it."""
    tensors = _weights(model)
    saved = names_of_groups(model, optimizer)
    for group in saved["param_groups"]:
        for name, number in zip(group["names"], group["params"], strict=True):
            entry = saved["state"].get(number, {})
            tensors |= {f"optimizer/{name}/{key}": value for key, value in entry.items()}
    with _of_one_process_too():
        save(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=not distributed.is_initialized())
    if leads():
        torch.save(saved["param_groups"], folder / GROUPS)


def read_weights(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into `model`, each process its own parts. All processes must call it.

    Raises:
        CheckpointError: the checkpoint and the model differ in any name or shape.
    """
    tensors = _weights(model)
    there = {name: entry for name, entry in _entries(folder).items() if name.startswith("weights/")}
    shapes = {name: entry.size for name, entry in there.items()}
    if wrong := sorted({*shapes.items()} ^ {(name, tensor.shape) for name, tensor in tensors.items()}):
        names = sorted({name.removeprefix("weights/") for name, _ in wrong})
        raise CheckpointError(
            f"{folder / SHARDS} is of another model: {len(names)} weights differ ({', '.join(names[:3])})"
        )
    _read(tensors, folder)


def read_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Give `optimizer` a checkpoint's state, each process its own parts. All processes must call it.

    Raises:
        CheckpointError: it is of other weights.
    """
    put_away(model)
    groups: list[dict[str, Any]] = torch.load(folder / GROUPS, weights_only=True)
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
        like_it = parameter is not None and entry.size == parameter.shape
        tensors[entry_name] = (
            torch.empty_like(parameter.detach(), dtype=dtype)
            if like_it and parameter is not None
            else torch.empty(entry.size, dtype=dtype)
        )
        state.setdefault(numbers[name], {})[key] = tensors[entry_name]
    _read(tensors, folder)
    restore_optimizer(model, optimizer, {"state": state, "param_groups": groups})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that a checkpoint holds, tied ones once."""
    put_away(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (f"weights/{name}", tensor.detach()))
    return dict(found.values())


def _entries(folder: Path) -> Mapping[str, TensorStorageMetadata]:
    entries = FileSystemReader(folder / SHARDS).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    with _of_one_process_too():
        load(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=not distributed.is_initialized())


@contextmanager
def _of_one_process_too() -> Iterator[None]:
    """One process alone is what was meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
