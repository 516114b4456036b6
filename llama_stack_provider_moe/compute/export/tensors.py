"""Read and write safetensors files piece by piece; the library needs a whole file in memory to write it.

The format (https://huggingface.co/docs/safetensors): 8 bytes of length N, little-endian; N bytes of JSON, name ->
{dtype, shape, data_offsets from the header's end}; then the tensors without gaps.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.small_files import read_index

# Names as in the library; only these dtypes are supported.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 1 << 20
_SENT_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file; `start` is its offset from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """`count` of its numbers from number `first` on, as a vector; default: all of them."""
        numbers = torch.empty(prod(self.shape) if count is None else count, dtype=self.dtype)
        self.read_into(numbers, first)
        return numbers

    def read_into(self, numbers: Tensor, first: int = 0) -> None:
        """Fill a contiguous tensor of this dtype on the CPU with the numbers from number `first` on."""
        assert numbers.dtype is self.dtype
        view, done = _bytes_of(numbers), 0
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first * self.dtype.itemsize)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise ModelError(f"{self.file}: ends inside tensor {self.name}")
                done += got

    def tensor(self) -> Tensor:
        """The whole tensor, in its shape."""
        return self.read().view(self.shape)

    def part(self, index: int) -> "TensorEntry":
        """The tensor at an index of the first axis."""
        shape = self.shape[1:]
        return replace(self, shape=shape, start=self.start + index * prod(shape) * self.dtype.itemsize)

    def in_dtype(self, dtype: torch.dtype) -> "TensorEntry":
        """The same entry with another dtype."""
        return replace(self, dtype=dtype)


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a file, in file order.

    Raises:
        ModelError: the file is missing, or is not a complete safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path}: its header of {length:,} bytes does not fit a file of {size:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is not a safetensors file that this version can read: {error!r}") from error
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise ModelError(f"{path}: tensor {entry.name} starts at byte {entry.start:,}, expected {end:,}")
        end += entry.nbytes
    if end != size:
        raise ModelError(f"{path}: has {size:,} bytes, expected {end:,} by its header")
    return entries


def _entry(path: Path, name: str, fields: Mapping[str, Any], begin: int) -> TensorEntry:
    first, last = map(int, fields["data_offsets"])
    entry = TensorEntry(name, DTYPES[fields["dtype"]], tuple(map(int, fields["shape"])), path, begin + first)
    if min(entry.shape, default=0) < 0 or last - first != entry.nbytes:
        raise ModelError(f"{path}: tensor {name} of shape {entry.shape} can't have {last - first:,} bytes")
    return entry


def read_model(folder: Path) -> dict[str, TensorEntry]:
    """Name -> tensor for a model's folder, in the order of files and of their bytes.

    Raises:
        ModelError: there are no tensors, a name occurs twice, or index and files differ.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ModelError(f"base: {folder} has no {SINGLE} and no {INDEX}")
        return {entry.name: entry for entry in read_header(folder / SINGLE)}
    try:
        weight_map: dict[str, str] = read_index(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"base: {index} can't be read: {error!r}") from error
    if outside := [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]:
        raise ModelError(f"base: {index} names {outside[0]!r}, which is not a file beside it")
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        for entry in read_header(folder / file):
            if weight_map.get(entry.name) != file:
                raise ModelError(f"base: {folder / file} holds {entry.name}, but {INDEX} does not say so")
            entries[entry.name] = entry
    if lost := sorted(set(weight_map) - set(entries)):
        raise ModelError(f"base: {INDEX} names {lost[0]}, but {weight_map[lost[0]]} does not hold it")
    return entries


def shards(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    """Split the tensors into files of at most `shard_bytes`, or of one larger tensor; wide dtypes first in each.

    This is the library's order; every number then starts at a multiple of its size.
    """
    found: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if found[-1] and entry.nbytes > room:
            found.append([])
            room = shard_bytes
        found[-1].append(entry)
        room -= entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in found]


def header(entries: Sequence[TensorEntry]) -> bytes:
    """Length and JSON of a file with these tensors, in this order."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]
        }  # fmt: skip
        end += entry.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_name(number: int, count: int) -> str:
    """Name of file `number` of `count`, from 0 on, as transformers names it."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_text(parts: list[list[TensorEntry]]) -> str:
    """The index of a model whose tensors are in several files."""
    weight_map = {entry.name: file_name(i, len(parts)) for i, part in enumerate(parts) for entry in part}
    entries = [entry for part in parts for entry in part]
    totals = {
        "total_parameters": sum(prod(entry.shape) for entry in entries),
        "total_size": sum(entry.nbytes for entry in entries),
    }
    return json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def copy_bytes(entry: TensorEntry, out: IO[bytes]) -> None:
    """Append a tensor unchanged; its bytes do not pass through this process's memory."""
    start, left = entry.start, entry.nbytes
    out.flush()
    with entry.file.open("rb", buffering=0) as file:
        while left:
            sent = os.sendfile(out.fileno(), file.fileno(), start, min(left, _SENT_BYTES))
            if not sent:
                raise ModelError(f"{entry.file}: ends inside tensor {entry.name}")
            start, left = start + sent, left - sent
            liveness.alive()


def append(tensor: Tensor, out: IO[bytes]) -> None:
    """Append the numbers of a tensor."""
    out.write(_bytes_of(tensor.contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def pieces(entry: TensorEntry, unit: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first number, numbers) of a tensor, in pieces of about 1 MB and of a multiple of `unit` numbers."""
    total = prod(entry.shape)
    step = max(1, _PIECE_BYTES // (entry.dtype.itemsize * max(1, unit))) * max(1, unit)
    for first in range(0, total, step):
        yield first, entry.read(first, min(step, total - first))
        liveness.alive()
