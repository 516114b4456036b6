"""A GGUF file in the folder of llama.cpp's router: complete or not at all, and never in the place of another file.

The file gets its name by a hard link, which fails if the name exists. Before that it is there under a hidden name,
which the router does not list: as a second link to the artifact's file, or as a copy on another file system.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.errors import ExportError, NoRoom
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.serving.record import PlacedFile

_PIECE_BYTES = 8 << 20
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def path_of(models_dir: Path, name: str) -> Path:
    """The file of a model."""
    return models_dir / f"{name}.gguf"


def place(source: Path, target: Path, record: Callable[[PlacedFile], None]) -> bool:
    """Place a file, durably.

    Args:
        source: the file.
        target: its place, in an existing folder.
        record: called with the identity of the new file before it gets its name.

    Returns:
        Whether it shares its disk space with `source`.

    Raises:
        ExportError: the name exists, or the folder can't be written.
        NoRoom: the folder's disk has no room for a copy.
    """
    hidden = _hidden(target)
    try:
        hidden.unlink(missing_ok=True)  # of an earlier attempt
        try:
            shared = _second(source, hidden)
            record(PlacedFile.of(hidden))
            _rename_unless_taken(hidden, target)
        finally:
            hidden.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise ExportError(f"{target} exists and is not of this export; nothing was replaced") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"{target.parent} has no room for a copy of {source.stat().st_size:,} bytes") from error
        raise ExportError(f"serving.models_dir: {target} can't be written ({error.strerror or error})") from error
    return shared


def take_away(target: Path, placed: PlacedFile | None) -> bool:
    """Remove a file that was placed, and what an attempt left under the hidden name.

    Args:
        target: where it is.
        placed: its identity; None: it never got there.

    Returns:
        Whether it was there.

    Raises:
        OSError: it can't be removed.
    """
    with suppress(FileNotFoundError):
        _hidden(target).unlink()
    if placed is None or not placed.is_at(target):
        return False
    target.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return True


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def _second(source: Path, hidden: Path) -> bool:
    try:
        os.link(source, hidden)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    size = source.stat().st_size
    with (
        liveness.stage(f"copying {source.name} for inference", size, "bytes") as counter,
        source.open("rb") as read,
        hidden.open("xb") as written,
    ):
        while piece := read.read(_PIECE_BYTES):
            written.write(piece)
            counter.advance(len(piece))
        written.flush()
        os.fsync(written.fileno())
    hidden.chmod(source.stat().st_mode & 0o777)
    return False


def _rename_unless_taken(hidden: Path, target: Path) -> None:
    try:
        os.link(hidden, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():  # a file system without hard links has no rename that refuses; this is as near as it gets
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        hidden.rename(target)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
