"""Disk space that is kept for the job store: a file beside the SQLite database, deleted when the disk is full.

Without it, nobody could record that a job has ended, or delete a job to free space.
"""

import os
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.control.store import disk

# Larger than the store's write-ahead log grows between two checkpoints, see `opening.CHECKPOINT_PAGES`.
RESERVE_BYTES = 1 << 20
# The most that one transaction needs. The reserve is not released earlier, or a job that still writes would take it.
RELEASE_BELOW_BYTES = 256 << 10
# The reserve is created again once this much is free. With less, creating it would itself fill the disk.
CREATE_ABOVE_BYTES = disk.FULL_BELOW_BYTES + 2 * RESERVE_BYTES


class Reserve:
    """The reserve of one database; safe to use from several threads and processes.

    Args:
        database: Path of the database's file.
    """

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(f"{database.name}-reserve")

    def maintain(self) -> None:
        """Release the reserve if a transaction might find no space; create it if there is space.

        Call it before each transaction that writes. It never raises: without a reserve, the store behaves like any
        other program on a full disk.
        """
        free_bytes = self.release_if_needed()
        if free_bytes is not None and free_bytes > CREATE_ABOVE_BYTES and not self._is_complete():
            try:
                # Random bytes, because a file system that compresses would keep no space for zeros.
                with open(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                    file.write(os.urandom(RESERVE_BYTES))
            except OSError:
                with suppress(OSError):
                    self.path.unlink()

    def release_if_needed(self) -> int | None:
        """Release the reserve if a transaction might find no space; return the free bytes before, None if unknown."""
        free_bytes = disk.free_bytes(self.path.parent)
        if free_bytes is not None and free_bytes < RELEASE_BELOW_BYTES:
            with suppress(OSError):
                self.path.unlink()
        return free_bytes

    def _is_complete(self) -> bool:
        try:
            return self.path.stat().st_size == RESERVE_BYTES
        except OSError:
            return False
