"""The answers of the current generation in a checkpoint, so that a resumed run learns from the same ones."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_stack_provider_moe.compute.runtime.peers import Peers
from llama_stack_provider_moe.errors import CheckpointError
from llama_stack_provider_moe.ground.counting import number_of

FILE = "rollouts.safetensors"  # of rank 0
Rollout = dict[str, Tensor | None]  # the micro-batches that TRL made of a generation's answers


def file_of(folder: Path, rank: int) -> Path:
    """The file of a process's answers in a checkpoint."""
    return folder / (f"rollouts_{rank}.safetensors" if rank else FILE)


def write(folder: Path, peers: Peers, micro_step: int, rollouts: list[Rollout] | None) -> None:
    """Write the answers that steps of this process after this one learn from.

    Args:
        folder: of the checkpoint.
        peers: the job's processes.
        micro_step: number of micro-batches since the job's start.
        rollouts: a micro-batch each; None: the next step generates anew.
    """
    tensors: dict[str, Tensor] = {}
    absent: list[list[str]] = []
    for number, rollout in enumerate(rollouts or []):
        # Copies: some micro-batches are views of one tensor, which a file can't hold twice.
        tensors |= {f"{number}.{name}": value.clone() for name, value in rollout.items() if value is not None}
        absent.append([name for name, value in rollout.items() if value is None])
    told = {"micro_step": str(micro_step), "absent": json.dumps(absent), "processes": str(peers.size)}
    save_file(tensors, file_of(folder, peers.rank), metadata=told)


def read(folder: Path, peers: Peers, device: torch.device) -> tuple[int, list[Rollout] | None]:
    """What `write` wrote: the number of micro-batches, and the answers.

    Raises:
        CheckpointError: steps after this one learn from answers that another number of processes divided among them.
    """
    with safe_open(folder / FILE, framework="pt") as first:
        told = first.metadata()
    processes = int(told.get("processes", "1"))  # an older version had one process
    if processes != peers.size and json.loads(told["absent"]):
        raise CheckpointError(f"{folder.name} is among the steps that learn from one generation, whose answers are "
                              f"divided among {number_of(processes, 'process', 'processes')}; expected as many, here "
                              f"are {peers.size}")  # fmt: skip
    if not json.loads(told["absent"]):
        return int(told["micro_step"]), None
    with safe_open(file_of(folder, peers.rank), framework="pt", device=str(device)) as file:
        told = file.metadata()
        rollouts: list[Rollout] = [dict.fromkeys(names) for names in json.loads(told["absent"])]
        for key in file.keys():  # noqa: SIM118  not a dict
            number, _, name = key.partition(".")
            rollouts[int(number)][name] = file.get_tensor(key)
    return int(told["micro_step"]), rollouts
