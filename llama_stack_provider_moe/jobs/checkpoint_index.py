"""Which checkpoints of a job are whole: written with the checksum of every file, checked against them before use.

A checkpoint folder is renamed into place only when all of it is on disk, so a half-written one has no such name. The
checksums tell the rest: a disk that lost bytes, a file that somebody edited, a copy that was cut short.
"""

import hashlib
import os
import re
from pathlib import Path

from pydantic import Field, ValidationError

from llama_stack_provider_moe.jobs.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import Block, JobSpec

CHECKSUMS = "checksums.json"
STATE = "trainer_state.json"  # without it a folder has weights, and nothing to go on from
_NAME = re.compile(r"(epoch|step)-(\d+)")


class FileSum(Block):
    """One file of a checkpoint."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Checksums(Block):
    """Every file under a folder, by its path within it, `checksums.json` itself left out."""

    step: int = Field(ge=0, description="Optimiser steps taken.")
    files: dict[str, FileSum]


def sha256_of(path: Path) -> str:
    """Hex digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, step: int) -> None:
    """Take the checksums of everything under `folder`, and write them there; the last thing before its renaming."""
    files = {
        str(path.relative_to(folder)): FileSum(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    write_atomic(folder / CHECKSUMS, Checksums(step=step, files=files))


def read_checksums(folder: Path) -> Checksums | None:
    """The checksums of a folder that has them; None where the file is missing or is none of ours."""
    try:
        return Checksums.model_validate_json((folder / CHECKSUMS).read_bytes())
    except (OSError, ValidationError):
        return None


def verify(folder: Path, deep: bool = True) -> str | None:
    """Why `folder` is no checkpoint to go on from, or None where it is one.

    Args:
        folder: of one checkpoint.
        deep: read every byte; else names and sizes alone are compared.
    """
    sums = read_checksums(folder)
    if sums is not None and STATE not in sums.files:
        return f"it has no {STATE}"
    return verify_files(folder, deep)


def verify_files(folder: Path, deep: bool = True) -> str | None:
    """Why the files of an artifact are not those that were written, or None where they are; `deep` as in `verify`."""
    sums = read_checksums(folder)
    if sums is None:
        return f"{CHECKSUMS} is missing or can't be read"
    for name, expected in sums.files.items():
        path = folder / name
        try:
            size = os.stat(path, follow_symlinks=False).st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != expected.bytes:
            return f"{name} has {size} bytes, {expected.bytes} were written"
        if deep and sha256_of(path) != expected.sha256:
            return f"{name} is not what was written: its checksum differs"
    return None


def checkpoint_folders(folder: JobFolder, spec: JobSpec) -> list[Path]:
    """The job's checkpoint folders, valid or not, the one of the latest step first."""
    try:
        found = [path for path in folder.checkpoints(spec).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def valid_checkpoints(folder: JobFolder, spec: JobSpec, deep: bool = True) -> list[Path]:
    """Those that a run can go on from, the latest first."""
    return [path for path in checkpoint_folders(folder, spec) if verify(path, deep) is None]


def _step(path: Path) -> int:
    sums = read_checksums(path)
    return -1 if sums is None else sums.step
