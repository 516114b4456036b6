"""The header of a GGUF file: its metadata and the actual type of each tensor.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 3, little-endian: magic, version,
counts; keys and values; name, shape, type and offset of each tensor; then the data, from the next multiple of the
alignment on.
"""

import os
import struct
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO

from llama_stack_provider_moe.errors import ExportError

# Number of a tensor type -> name, numbers per block, bytes per block (ggml.h, ggml-common.h).
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 26: ("I32", 1, 4), 30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 24  # largest plausible count in a header; more means a broken file
Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; `shape` is in llama.cpp's order, the length of a row first; `start` is its first byte in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a file; for arrays only the lengths are kept."""

    metadata: dict[str, Scalar]
    tensors: tuple[GgufTensor, ...]

    def type_counts(self) -> dict[str, int]:
        """Name of each tensor type -> number of tensors, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def read_header(path: Path) -> GgufHeader:
    """Read the header, and check that the file is long enough for its tensors.

    Raises:
        ExportError: the file is not a GGUF file of version 3, is truncated, or has tensors of an unknown type.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except (OSError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ExportError(f"{path.name} is not a complete GGUF file: {error}") from error


def _read(file: IO[bytes], path: Path) -> GgufHeader:
    magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version != 3 or max(tensors, pairs) > _MOST:
        raise ExportError(f"{path.name} is not a GGUF file of version 3")
    metadata: dict[str, Scalar] = {}
    for _ in range(pairs):
        key = _string(file)
        metadata[key] = _value(file, _integer(file, "I"))
    found, end = [], 0
    for _ in range(tensors):
        name = _string(file)
        dimensions = _integer(file, "I")
        if dimensions > 4:
            raise ExportError(f"{path.name}: tensor {name} has {dimensions} dimensions")
        shape = tuple(_integer(file, "Q") for _ in range(dimensions))
        number, offset = _integer(file, "I"), _integer(file, "Q")
        if number not in TENSOR_TYPES:
            raise ExportError(f"{path.name}: tensor {name} has type number {number}, which this version does not know")
        kind, block, block_bytes = TENSOR_TYPES[number]
        tensor = GgufTensor(name, kind, shape, prod(shape) // block * block_bytes, offset)
        end = max(end, offset + tensor.nbytes)
        found.append(tensor)
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // alignment) * alignment
    size = os.fstat(file.fileno()).st_size
    if found and size < start + end:
        raise ExportError(f"{path.name} ends after {size:,} of {start + end:,} bytes")
    return GgufHeader(metadata, tuple(replace(tensor, start=start + tensor.start) for tensor in found))


def _value(file: IO[bytes], kind: int) -> Scalar:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _scalar(kind))
    inner, count = _integer(file, "I"), _integer(file, "Q")
    if count > _MOST:
        raise ExportError(f"an array of the header has {count:,} entries")
    if inner == _STRING:
        for _ in range(count):
            file.seek(_integer(file, "Q"), os.SEEK_CUR)
    elif inner == _ARRAY:
        for _ in range(count):
            _value(file, _ARRAY)
    else:
        file.seek(count * struct.calcsize(f"<{_scalar(inner)}"), os.SEEK_CUR)
    return count


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ExportError(f"a value of the header has type number {kind}, which GGUF does not have")
    return _SCALARS[kind]


def _string(file: IO[bytes]) -> str:
    length = _integer(file, "Q")
    if length > _MOST:
        raise ExportError(f"a text of the header has {length:,} bytes")
    return file.read(length).decode()


def _integer(file: IO[bytes], code: str) -> int:
    return int(_unpack(file, code))


def _unpack(file: IO[bytes], code: str) -> int | float | bool:
    code = f"<{code}"
    value: int | float | bool = struct.unpack(code, file.read(struct.calcsize(code)))[0]
    return value
