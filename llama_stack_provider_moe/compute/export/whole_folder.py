"""A folder that appears when it is complete, or not at all; used by merging and by ablation."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_stack_provider_moe.compute.export.staging import staging_folder
from llama_stack_provider_moe.errors import NoRoom
from llama_stack_provider_moe.jobdir.checkpoint_index import sync

SLACK_BYTES = 1 << 20  # for folders and half-filled blocks of the file system


@contextmanager
def complete_or_nothing(target: Path, ending: str, busy: str) -> Iterator[Path]:
    """A folder beside `target` that is synced and renamed to it; files of an earlier, killed process are removed.

    Args:
        target: the output; must not exist.
        ending: ending of the hidden folder's name.
        busy: expectation in the error if another process writes the same output.
    """
    with staging_folder(target, ending, busy) as parts:
        try:
            yield parts
            for path in parts.iterdir():
                sync(path)
            sync(parts)
            os.rename(parts, target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise


def check_room(target: Path, needed: int) -> None:
    """Raise `NoRoom` unless the disk of `target` has `needed` bytes free, and some more."""
    needed += SLACK_BYTES
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise NoRoom(f"out: {target} needs {needed:,} bytes, and its disk has {free:,} free; nothing was written")
