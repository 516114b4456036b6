"""Which checkpoints of a job are valid: each has a checksum of every file, which is verified before use.

A checkpoint folder gets its name only when all of it is on disk, so an unfinished one never has it. The checksums
detect later damage: a disk that lost bytes, a file that somebody edited, an incomplete copy.
"""

import ctypes
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec.blocks import Block

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec import JobSpec

CHECKSUMS = "checksums.json"
STATE = "trainer_state.json"  # a folder without it has weights, but training can't resume from it
_READ_BYTES = 1 << 20
_SYNCED_BYTES = 64 << 20
_WRITE_AND_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER, sync_file_range(2)
_NAME = re.compile(r"(epoch|step)-(\d+)")


class FileSum(Block):
    """One file of a checkpoint."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Checksums(Block):
    """Every file under a folder by its relative path, except `checksums.json` itself."""

    step: int = Field(ge=0, description="Optimiser steps taken.")
    files: dict[str, FileSum]


def sha256_of(path: Path, tell: Callable[[int], None] = lambda count: liveness.alive()) -> str:
    """Return the hex digest of a file of any size; `tell` is called with the number of bytes of each piece read."""
    digest, buffer = hashlib.sha256(), bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            tell(count)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. A large file is flushed in pieces, each a sign of life."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():
            libc = ctypes.CDLL(None)
            for start in range(0, os.fstat(handle).st_size, _SYNCED_BYTES):
                # This only starts the writing; `fsync` below reports errors.
                libc.sync_file_range(handle, ctypes.c_int64(start), ctypes.c_int64(_SYNCED_BYTES), _WRITE_AND_WAIT)
                liveness.alive()
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checksums(folder: Path, step: int) -> None:
    """Write the checksums of all files under `folder` into it. Call it last, before the folder is renamed."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    total = sum(path.stat().st_size for path in paths)
    with liveness.stage("computing checksums", total, "bytes") as counter:
        files = {
            str(path.relative_to(folder)): FileSum(bytes=path.stat().st_size, sha256=sha256_of(path, counter.advance))
            for path in paths
        }
    write_atomic(folder / CHECKSUMS, Checksums(step=step, files=files))


def read_checksums(folder: Path) -> Checksums | None:
    """Return the checksums of a folder; None if the file is missing or not valid."""
    try:
        return read_as(Checksums, (folder / CHECKSUMS).read_bytes())
    except (OSError, ValidationError):
        return None


def verify(folder: Path, deep: bool = True) -> str | None:
    """Return why training can't resume from `folder`; None if it can.

    Args:
        folder: Folder of one checkpoint.
        deep: Read every byte; otherwise compare only names and sizes.
    """
    sums = read_checksums(folder)
    if sums is not None and STATE not in sums.files:
        return f"it has no {STATE}"
    return verify_files(folder, deep)


def verify_files(folder: Path, deep: bool = True) -> str | None:
    """Return how the files of an artifact differ from those that were written, or None; `deep`: see `verify`."""
    sums = read_checksums(folder)
    if sums is None:
        return f"{CHECKSUMS} is missing or can't be read"
    total = sum(expected.bytes for expected in sums.files.values()) if deep else 0
    with liveness.stage(f"verifying {folder.name}", total, "bytes") as counter:
        for name, expected in sums.files.items():
            path = folder / name
            try:
                size = os.stat(path, follow_symlinks=False).st_size
            except OSError as error:
                return f"{name}: {error.strerror}"
            if size != expected.bytes:
                return f"{name} has {size} bytes, {expected.bytes} were written"
            if deep and sha256_of(path, counter.advance) != expected.sha256:
                return f"{name} was changed after it was written: its checksum differs"
    return None


def checkpoint_folders(folder: JobFolder, spec: "JobSpec") -> list[Path]:
    """Return the job's checkpoint folders, valid or not, the latest step first."""
    try:
        found = [path for path in folder.checkpoints(spec).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def valid_checkpoints(folder: JobFolder, spec: "JobSpec", deep: bool = True) -> list[Path]:
    """Return the checkpoints that training can resume from, the latest first."""
    return [path for path in checkpoint_folders(folder, spec) if verify(path, deep) is None]


def _step(path: Path) -> int:
    sums = read_checksums(path)
    return -1 if sums is None else sums.step
