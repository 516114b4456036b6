"""The file of measurements: mean hidden states of two sets after every decoder block, and where they came from.

It is a safetensors file. Shapes: L decoder blocks, H width of the residual stream, N rows of a set; the two halves of a
set are its rows 1, 3, 5, ... and 2, 4, 6, ...
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_stack_provider_moe.errors import InvalidInput, shorten
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.spec.ablation import BASELINE, MEASUREMENTS_FILE, TARGET
from llama_stack_provider_moe.spec.blocks import Block, DType

_PROVENANCE = "ablation"
SETS = (TARGET, BASELINE)


class MeasuredSet(Block):
    """One set of prompts."""

    source: str = Field(description="Id of the data set, or its file.")
    rows: int
    sha256: str = Field(description="SHA-256 of the canonical rows.")


class Provenance(Block):
    """Where measurements came from."""

    version: Literal[1] = 1
    model: str
    fingerprint: str = Field(description="Fingerprint of the model's weights, without an adapter.")
    adapter: str | None = Field(description="SHA-256 of the adapter's weights; null: none.")
    model_type: str
    layers: int = Field(ge=1, description="Decoder blocks, L.")
    width: int = Field(ge=1, description="Width of the residual stream, H.")
    position: int
    span: int = Field(default=1, description="Tokens that are averaged, the last of them at `position`.")
    dtype: DType
    quantize_bits: int | None
    quantize_scales: bool = Field(default=False, description="Whether the scales of the bits were quantised too.")
    chat_template: str = Field(description="SHA-256 of the chat template that rendered the prompts.")
    sets: dict[str, MeasuredSet]
    router_norms: dict[int, str | None] = Field(
        description="Decoder block with a router -> name in the block of the norm whose output the router reads; null: "
        "it reads something else."
    )
    normed_outputs: list[str] = Field(
        description="Modules whose outputs go through a norm before they are added to the residual stream."
    )
    output_norms: dict[str, str] = Field(
        default_factory=dict,
        description="Such a module -> its norm, where nothing else stands between it and the residual stream.",
    )


@dataclass(frozen=True)
class MeasuredStates:
    """The figures of one set.

    Attributes:
        mean_LH: of all rows, fp64.
        halves_2LH: of each half, fp64.
        scores_NL: of each row, its state along the unit direction that the other half's means give, fp32.
    """

    mean_LH: Tensor
    halves_2LH: Tensor
    scores_NL: Tensor


@dataclass(frozen=True)
class Measurements:
    """What `ablation_measure` found."""

    provenance: Provenance
    target: MeasuredStates
    baseline: MeasuredStates

    def of(self, name: str) -> MeasuredStates:
        """The figures of a set by its name."""
        return {TARGET: self.target, BASELINE: self.baseline}[name]


def of_job(folder: JobFolder, job: str) -> Path:
    """The file of another job, whose folder is beside `folder`."""
    return JobFolder(folder.root.parent / job).measurements / MEASUREMENTS_FILE


def write(found: Measurements, path: Path) -> None:
    """Write the file, complete or not at all."""
    tensors: dict[str, Tensor] = {}
    for name in SETS:
        each = found.of(name)
        tensors |= {
            f"{name}.mean": each.mean_LH.contiguous(),
            f"{name}.halves": each.halves_2LH.contiguous(),
            f"{name}.scores": each.scores_NL.contiguous(),
        }
    writing = path.with_name(f".{path.name}.writing")
    save_file(tensors, writing, metadata={"format": "pt", _PROVENANCE: found.provenance.model_dump_json()})
    os.replace(writing, path)


def read(path: Path, field: str) -> Measurements:
    """Read and check a file of measurements.

    Args:
        path: the file.
        field: the caller's name of the setting that names it, for errors.

    Raises:
        InvalidInput: it is no such file, is damaged, or has numbers that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            provenance = Provenance.model_validate_json(metadata.get(_PROVENANCE, ""), extra="ignore")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError) as error:
        why = shorten(" ".join(str(error).split()), 120)
        raise InvalidInput(field, str(path), f"measurements that `moe-train ablate measure` wrote ({why})") from None
    layers, width = provenance.layers, provenance.width
    for name in SETS:
        rows = provenance.sets[name].rows if name in provenance.sets else -1
        shapes = {"mean": (layers, width), "halves": (2, layers, width), "scores": (rows, layers)}
        for part, shape in shapes.items():
            _check(tensors.get(f"{name}.{part}"), f"{name}.{part}", shape, path, field)
    made = {
        name: MeasuredStates(*(tensors[f"{name}.{part}"] for part in ("mean", "halves", "scores"))) for name in SETS
    }
    return Measurements(provenance, made[TARGET], made[BASELINE])


def _check(tensor: Tensor | None, name: str, shape: tuple[int, ...], path: Path, field: str) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise InvalidInput(field, str(path), f"measurements with a tensor {name} of shape {shape}; it has {found}")
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        at = [int(index) for index in (~finite).nonzero()[0]]
        raise InvalidInput(field, str(path), f"finite measurements; {name} is {float(tensor[tuple(at)])} at {at}")
