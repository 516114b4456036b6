"""The answers of the current generation in a checkpoint, so that a resumed run learns from the same ones."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "rollouts.safetensors"
Rollout = dict[str, Tensor | None]  # the micro-batches that TRL made of a generation's answers


def write(folder: Path, micro_step: int, rollouts: list[Rollout] | None) -> None:
    """Write the answers that steps after this one learn from.

    Args:
        folder: of the checkpoint.
        micro_step: number of micro-batches since the job's start.
        rollouts: a micro-batch each; None: the next step generates anew.
    """
    tensors: dict[str, Tensor] = {}
    absent: list[list[str]] = []
    for number, rollout in enumerate(rollouts or []):
        # Copies: some micro-batches are views of one tensor, which a file can't hold twice.
        tensors |= {f"{number}.{name}": value.clone() for name, value in rollout.items() if value is not None}
        absent.append([name for name, value in rollout.items() if value is None])
    told = {"micro_step": str(micro_step), "absent": json.dumps(absent)}
    save_file(tensors, folder / FILE, metadata=told)


def read(folder: Path, device: torch.device) -> tuple[int, list[Rollout] | None]:
    """What `write` wrote: the number of micro-batches, and the answers."""
    with safe_open(folder / FILE, framework="pt", device=str(device)) as file:
        told = file.metadata()
        rollouts: list[Rollout] = [dict.fromkeys(names) for names in json.loads(told["absent"])]
        for key in file.keys():  # noqa: SIM118  not a dict
            number, _, name = key.partition(".")
            rollouts[int(number)][name] = file.get_tensor(key)
    return int(told["micro_step"]), rollouts or None
