"""Check a projector file (mmproj): the GGUF file of a vision tower and its projector, which llama.cpp's programs for
images load beside the language model's.

The installed library has no part that loads it. So the file is compared with the folder: its header with the config,
and its numbers with those of the folder's tensors, whatever the converter names them or how it splits or turns them.
"""

import mmap
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from llama_stack_provider_moe.compute.export.gguf_file import GgufHeader, GgufTensor, read_header
from llama_stack_provider_moe.compute.export.places import find_places
from llama_stack_provider_moe.compute.export.tensors import TensorEntry, pieces, read_model
from llama_stack_provider_moe.compute.moe.layout import outside_text
from llama_stack_provider_moe.compute.moe.model_types import blank_model, sees_images
from llama_stack_provider_moe.errors import ExportError
from llama_stack_provider_moe.ground import liveness

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 1 << 20  # numbers
_WORD = 1 << 64
# Odd constants of splitmix64 (Steele et al. 2014), as signed numbers: multiplication wraps.
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - _WORD, 0x94D049BB133111EB - _WORD
# A converter may change some numbers (Gemma's norms get 1 added); a file of another model shares none.
_LEAST_SHARE = 0.5


class NoProjector(ExportError):
    """A model has no projector file: it has no vision tower, or the converter does not know its family's."""


class ProjectorCheck(BaseModel):
    """What was compared of a projector file; `numbers` of the file, of which `same` are the folder's."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    projector: str
    layers: int
    width: int
    tensor_types: dict[str, int]
    numbers: int
    same: int
    in_folder: int

    def text(self) -> str:
        """The result in words."""
        types = ", ".join(f"{name} x{count}" for name, count in self.tensor_types.items())
        lines = [
            f"projector file {self.projector}, {self.layers} layers, for a language model {self.width:,} wide, "
            f"{self.bytes:,} bytes, tensors: {types}"
        ]
        if self.same == self.numbers == self.in_folder:
            lines.append(f"its {self.numbers:,} numbers are those of the folder's vision tower and projector")
        else:
            lines.append(
                f"note: {self.same:,} of its {self.numbers:,} numbers are among the {self.in_folder:,} of the folder's "
                "vision tower and projector; the converter changed the others, and they were not compared"
            )
        return "\n".join([*lines, "not loaded: the installed library of llama.cpp has no part for images"])


def vision_entries(model: Path) -> list[TensorEntry]:
    """The tensors in a folder that are beside its language model; empty for a model that sees no images."""
    config = AutoConfig.from_pretrained(model)
    if not reads_images(config):
        return []
    with torch.device("meta"):
        blank = blank_model(config, torch.float32)
    outside, disk = outside_text(blank), read_model(model)
    places = find_places(blank, {name: entry.shape for name, entry in disk.items()})
    return [entry for name, entry in disk.items() if places[name].parameter in outside]


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this config has a vision tower."""
    return sees_images(config) and getattr(config, "vision_config", None) is not None


def check_projector(file: Path, model: Path) -> ProjectorCheck:
    """Compare a projector file with the folder that it was made from.

    Raises:
        ExportError: it isn't a projector file, is for a language model of another width, has numbers that are not
            finite, or has the numbers of another model.
    """
    header = read_header(file)
    said = header.metadata
    wanted = {"general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": True}
    for key, value in wanted.items():
        if said.get(key) != value:
            raise ExportError(f"{file.name} is not a projector file: {key} is {said.get(key)!r}, expected {value!r}")
    width = int(AutoConfig.from_pretrained(model).get_text_config().hidden_size)
    if said.get("clip.vision.projection_dim") != width:
        raise ExportError(f"{file.name}: it makes vectors of {said.get('clip.vision.projection_dim')} numbers, and the "
                          f"language model's have {width}")  # fmt: skip
    entries = vision_entries(model)
    ours = Counter(_hash(_read(entry)) for entry in entries)
    in_folder = sum(prod(entry.shape) for entry in entries)
    found = {each.name: _hash(numbers) for each, numbers in _tensors(file, header)}
    numbers = {each.name: prod(each.shape) for each in header.tensors}
    total = sum(numbers.values())
    whole = total == in_folder and sum(found.values()) % _WORD == sum(key * n for key, n in ours.items()) % _WORD
    same = total if whole else sum(numbers[name] for name, key in found.items() if ours[key])
    if same < _LEAST_SHARE * total:
        raise ExportError(f"{file.name}: {same:,} of its {total:,} numbers are those of {model.name}; expected all, or "
                          "nearly all")  # fmt: skip
    projector = said.get("clip.projector_type", said.get("clip.vision.projector_type", "of no stated type"))
    return ProjectorCheck(
        bytes=file.stat().st_size, projector=str(projector), layers=int(said.get("clip.vision.block_count", 0)),
        width=width, tensor_types=header.type_counts(), numbers=total, same=same, in_folder=in_folder,
    )  # fmt: skip


def _read(entry: TensorEntry) -> Iterator[Tensor]:
    return (numbers for _, numbers in pieces(entry, 1))


def _hash(parts: Iterator[Tensor]) -> int:
    """A hash of numbers as fp32, whatever their order; that of two tensors together is the sum of both."""
    total = 0
    for part in parts:
        bits = (part.float() + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
        mixed = (bits ^ (bits << 31)) * _FIRST
        mixed = (mixed ^ (mixed >> 27)) * _SECOND
        total += int((mixed ^ (mixed >> 31)).sum())
    return total % _WORD


def _tensors(file: Path, header: GgufHeader) -> Iterator[tuple[GgufTensor, Iterator[Tensor]]]:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for tensor in header.tensors:
            dtype = _DTYPES.get(tensor.type)
            if dtype is None:
                raise ExportError(f"{file.name}: tensor {tensor.name} is {tensor.type}; expected F32, F16 or BF16")
            yield tensor, _numbers(view, tensor, dtype, file.name)
            liveness.alive()


def _numbers(view: mmap.mmap, tensor: GgufTensor, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    end = tensor.start + tensor.nbytes
    for start in range(tensor.start, end, _PIECE * dtype.itemsize):
        piece = bytearray(view[start : min(end, start + _PIECE * dtype.itemsize)])
        numbers = torch.frombuffer(piece, dtype=dtype)
        if not bool(numbers.isfinite().all()):
            raise ExportError(f"{name}: tensor {tensor.name} has numbers that are not finite")
        yield numbers
