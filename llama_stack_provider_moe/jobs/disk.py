"""A full disk: whether it is one, and the room that a dead process's unfinished work takes up.

Asked of the file system, for a process that can't write often can't say so either.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.jobs.folder import JobFolder

# What is left of a full disk and nobody gets: the rest of a page, blocks that the file system keeps for itself.
FULL_BELOW_BYTES = 1 << 20
# Under such names the training process writes what it renames once it is whole, and takes down what it prunes.
_UNFINISHED = (".writing", ".merging", ".removing")


def full(folder: Path) -> str | None:
    """For a person, why nothing more can be written below `folder`; None where there is room, or nobody can tell."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    # Blocks that are kept for root are root's to use.
    free_bytes = found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail)
    if free_bytes < FULL_BELOW_BYTES:
        return f"the disk is full ({folder}: {free_bytes} bytes are free)"
    if found.f_files and not found.f_ffree:
        return f"the disk is full ({folder}: it has no room for one more file)"
    return None


def full_by(error: Exception, folder: Path) -> str | None:
    """The same, where something failed with `error`: it may say so, or be a consequence in words of its own."""
    no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if no_room or "database or disk is full" in str(error):  # SQLite's words
        return full(folder) or f"the disk is full ({folder})"
    return full(folder)


def full_for(folder: JobFolder) -> str | None:
    """The same for all places that a job writes to."""
    return next((told for place in _places(folder) if (told := full(place)) is not None), None)


def clear_unfinished(folder: JobFolder) -> None:
    """Delete what a process that is gone had not finished writing: often what has filled the disk."""
    checkpoints, artifacts = _places(folder)[1], folder.artifacts
    for place in (checkpoints, artifacts):
        if place.is_dir():
            for path in place.iterdir():
                if path.name.startswith(".") and path.name.endswith(_UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)


def _places(folder: JobFolder) -> tuple[Path, Path]:
    checkpoints = folder.root / "checkpoints"
    with suppress(OSError, ValueError):  # no spec, or none of ours: then nothing was ever written elsewhere
        checkpoints = folder.checkpoints(folder.read_spec())
    return folder.root, checkpoints
