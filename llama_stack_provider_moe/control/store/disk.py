"""Detect a full disk, and delete the unfinished files of a dead process.

The file system is asked, because a process that can't write often can't report it either.
"""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.control.store.store_errors import is_disk_full
from llama_stack_provider_moe.jobdir.folder import JobFolder

# A disk counts as full below this. The remaining bytes are unusable (the rest of a page, blocks that the file system
# keeps for itself) or belong to the store's reserve (`reserve.RESERVE_BYTES`), which only the store may use.
FULL_BELOW_BYTES = 2 << 20
# Suffixes of folders that the training process is still writing, or is about to delete.
_UNFINISHED = (".writing", ".merging", ".removing")


def free_bytes(folder: Path) -> int | None:
    """Bytes that this process may use below `folder`; 0 if no file can be added, None if unknown."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    if found.f_files and not found.f_ffree:
        return 0
    # Only root may use the blocks that are reserved for root.
    return int(found.f_frsize * (found.f_bfree if os.geteuid() == 0 else found.f_bavail))


def full(folder: Path) -> str | None:
    """Say why nothing more can be written below `folder`; None if there is room or the answer is unknown."""
    free = free_bytes(folder)
    if free is None or free >= FULL_BELOW_BYTES:
        return None
    return f"the disk is full ({folder}: {free} bytes are free)"


def full_by(error: Exception, folder: Path) -> str | None:
    """Like `full`, after an operation failed with `error`, which may report a full disk or be a consequence of one."""
    if is_disk_full(error):
        return full(folder) or f"the disk is full ({folder})"
    return full(folder)


def full_for(folder: JobFolder) -> str | None:
    """Like `full`, for all folders that a job writes to."""
    return next((reason for place in _places(folder) if (reason := full(place)) is not None), None)


class Unfinished:
    """Files that a process had not finished writing when it ended; often they filled the disk.

    Deleting them may take long, and the job may start again meanwhile. So they are renamed to unused names while
    nobody can start the job, and deleted afterwards.

    Args:
        folder: Folder of the job.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._places = (_places(folder)[1], folder.artifacts)
        self._aside: list[Path] = []

    def set_aside(self) -> None:
        """Rename the files, which takes almost no time and no disk space."""
        for place in self._places:
            for path in list(place.iterdir()) if place.is_dir() else ():
                if path.name.startswith(".") and path.name.endswith(_UNFINISHED):
                    aside = place / f".{uuid.uuid4().hex}.removing"
                    with suppress(OSError):  # it stays until the job ends the next time
                        path.rename(aside)
                        self._aside.append(aside)

    def delete(self) -> None:
        """Delete the renamed files."""
        for path in self._aside:
            shutil.rmtree(path, ignore_errors=True)


def _places(folder: JobFolder) -> tuple[Path, Path]:
    checkpoints = folder.root / "checkpoints"
    with suppress(OSError, ValueError):  # without a readable spec, nothing was written elsewhere
        checkpoints = folder.checkpoints(folder.read_spec())
    return folder.root, checkpoints
