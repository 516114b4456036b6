"""A locked hidden folder beside an output while it is written."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_stack_provider_moe.errors import InvalidInput


@contextmanager
def staging_folder(out: Path, ending: str, busy: str) -> Iterator[Path]:
    """Lock `.NAME.ending` beside `out`, remove files of a killed process from it, and yield it; it is not deleted.

    Args:
        out: the output that is written.
        ending: ending of the folder's name.
        busy: expectation in the error if another process holds the folder.

    Raises:
        InvalidInput: another process holds the folder, or it is a link.
    """
    folder = out.with_name(f".{out.name}.{ending}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise InvalidInput("out", str(out), f"a path where {folder.name} is not a link")
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput("out", str(out), busy) from None
        for stale in folder.iterdir():
            stale.unlink()
        yield folder
    finally:
        os.close(handle)
