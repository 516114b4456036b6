"""Read small files that others wrote: a model's config.json, an index, an adapter's settings, a report.

Only regular files are opened (a FIFO could block for ever), and only up to a size limit. Types of values are checked
before use. All problems raise `InvalidFile`, which names the file.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llama_stack_provider_moe.errors import InvalidFile, shorten

LIMIT_BYTES = 16 << 20
MAX_VALUES = 2_000_000  # per file; an index of the largest models has some 200,000
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def real_path(path: Path) -> Path:
    """Return the absolute path with all links resolved; missing parts stay as they are.

    Raises:
        OSError: The links form a cycle (ELOOP, with the path as `filename`).
        ValueError: The path contains a NUL or half a surrogate pair.
    """
    # For a cycle, `Path.resolve` raises RuntimeError, and from Python 3.13 on nothing.
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "its links lead in a circle", str(path)) from None
    try:
        return path.resolve()
    except RuntimeError:  # a cycle below a name that `os.stat` can't read
        raise OSError(errno.ELOOP, "its links lead in a circle", str(path)) from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Unlike opening a FIFO, this never waits for another process.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidFile: It is not a regular file, or can't be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # a socket, or a device without a driver
            raise InvalidFile(path, "is not a regular file") from None
        raise InvalidFile(path, f"can't be opened ({_why(error)})") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise InvalidFile(path, f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")
    return os.fdopen(handle, "rb")


def read_small(path: Path, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """Read a regular file of at most `limit_bytes`.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidFile: It is too large, is not a regular file, or can't be read.
    """
    with open_regular(path) as file:
        try:
            content = b""
            while len(content) <= limit_bytes and (piece := file.read(limit_bytes + 1 - len(content))):
                content += piece
        except OSError as error:
            raise InvalidFile(path, f"can't be read ({_why(error)})") from None
    if len(content) > limit_bytes:
        raise InvalidFile(path, f"has more than {limit_bytes:,} bytes")
    return content


def read_text(path: Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """Read a UTF-8 file, see `read_small`."""
    try:
        return read_small(path, limit_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFile(path, f"is not UTF-8 (byte {error.start})") from None


def read_object(path: Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file. It may contain Infinity, as some models' configs do.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidFile: It contains something else, or can't be read.
    """
    text = read_text(path, limit_bytes)
    if sum(text.count(sign) for sign in "{[,") > MAX_VALUES:
        raise InvalidFile(path, f"has more than {MAX_VALUES:,} values")
    try:
        content = json.loads(text)
    except RecursionError:
        raise InvalidFile(path, "is nested too deep") from None
    except ValueError as error:  # not JSON, or an integer with more digits than Python reads
        raise InvalidFile(path, f"is not JSON ({_why(error)})") from None
    if not isinstance(content, dict):
        raise InvalidFile(path, f"holds {shorten(content, 40)}, not an object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's config.json and check the types of `architectures`, `model_type` and `text_config`.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidFile: A type is wrong, or the file can't be read.
    """
    content = read_object(path)
    check(path, content, "model_type", str, "text")
    check(path, content, "text_config", dict, "an object")
    heads = check(path, content, "architectures", list, "a list of names") or []
    if not all(isinstance(head, str) for head in heads):
        raise InvalidFile(path, f"has architectures {shorten(heads)}; expected a list of names")
    return content


def read_index(path: Path) -> dict[str, str]:
    """Read the `weight_map` of a model.safetensors.index.json: name of a tensor -> name of the file beside it.

    Raises:
        FileNotFoundError: The file does not exist.
        InvalidFile: It has no weight_map, or can't be read.
    """
    found = check(path, read_object(path), "weight_map", dict, "an object")
    if found is None:
        raise InvalidFile(path, "has no weight_map")
    for name, file in found.items():
        if not isinstance(file, str):
            raise InvalidFile(path, f"has weight_map.{name[:80]} {shorten(file)}; expected the name of a file")
    return found


def check[T](path: Path, content: Mapping[str, object], key: str, kind: type[T], expected: str) -> T | None:
    """Return `content[key]`, checked to be of type `kind`; None if it is missing or null.

    Args:
        path: The file, for errors.
        content: The JSON object of the file.
        key: The key.
        kind: The expected type.
        expected: Description of the expected type, for errors.

    Raises:
        InvalidFile: The value has another type.
    """
    value = content.get(key)
    if value is not None and not isinstance(value, kind):
        raise InvalidFile(path, f"has {key} {shorten(value)}; expected {expected}")
    return value


def check_ids(path: Path, content: Mapping[str, Any], key: str) -> list[int]:
    """Return `content[key]` as a list of token ids; it may be one id, a list of ids, or missing.

    Raises:
        InvalidFile: The value is something else.
    """
    value = content.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(each) is int and 0 <= each < 1 << 32 for each in ids):
        raise InvalidFile(path, f"has {key} {shorten(value)}; expected a token's id or a list of them")
    return ids


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)[:200] or type(error).__name__
