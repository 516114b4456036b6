"""A hidden folder beside what is being made, which nobody else makes meanwhile; and writing that lasts."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_stack_provider_moe.errors import InvalidInput


@contextmanager
def hidden_folder(out: Path, ending: str, busy: str) -> Iterator[Path]:
    """`.NAME.ending` beside `out`, locked, and cleared of what one that was killed left in it; it is not removed.

    Args:
        out: what is being made.
        ending: of the folder's name.
        busy: what was expected, in the error where another process has the folder.

    Raises:
        InvalidInput: another process has it, or it is a link.
    """
    folder = out.with_name(f".{out.name}.{ending}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise InvalidInput("out", str(out), f"a place where {folder.name} is no link")
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


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
