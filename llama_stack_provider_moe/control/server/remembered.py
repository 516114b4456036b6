"""What this server has read of files that grow, so that a later look reads only what was appended since.

A look at a file that is not the one that was read before (it was replaced, cut, or cut and written again) begins anew.
All requests of the process share one memory; looks at the same file wait for each other, and the second finds that
nothing is left to read.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol

from llama_stack_provider_moe.ground.small_files import open_regular

# Lines have times in microseconds, so these bytes before the place that was reached don't repeat in another file.
SEAM_BYTES = 128


class Reading(Protocol):
    """What was read of one file."""

    def read(self, file: BinaryIO, start: int, end: int) -> int:
        """Read whole lines between two bytes of the file, and return the byte after the last one that was read."""

    @property
    def size_bytes(self) -> int:
        """About how much memory this needs."""


@dataclass(eq=False)
class _Known[R: Reading]:
    path: Path
    reading: R
    device: int = 0
    inode: int = 0
    position: int = 0
    seam: bytes = b""
    counted_bytes: int = 0
    lock: Lock = field(default_factory=Lock)

    def fits(self, file: BinaryIO, found: os.stat_result) -> bool:
        """Whether the file still begins with what was read."""
        if (self.device, self.inode) != (found.st_dev, found.st_ino) or found.st_size < self.position:
            return False
        return os.pread(file.fileno(), len(self.seam), self.position - len(self.seam)) == self.seam


class Remembered[R: Reading]:
    """What was read of at most `most_files` files, in about `most_bytes`; the longest unused one is forgotten first.

    Args:
        new: makes the reading of a file that is not known.
        most_files: largest number of files.
        most_bytes: memory of all readings; a single one may need more.
    """

    def __init__(self, new: Callable[[], R], most_files: int, most_bytes: int) -> None:
        self._new = new
        self._most_files = most_files
        self._most_bytes = most_bytes
        self._lock = Lock()
        self._known: OrderedDict[Path, _Known[R]] = OrderedDict()
        self._size_bytes = 0

    @contextmanager
    def of(self, path: Path) -> Iterator[tuple[R, int]]:
        """Yield the reading of a file as it is now, and the byte that it reaches; a missing file has an empty reading.

        No other thread changes the reading inside the block, so keep it short.
        """
        try:
            file = open_regular(path)
        except FileNotFoundError:
            yield self._new(), 0
            return
        with file:
            known = self._kept(path)
            with known.lock:
                self._read_on(known, file)
                self._forget(known)
                yield known.reading, known.position

    def _kept(self, path: Path) -> _Known[R]:
        with self._lock:
            known = self._known.setdefault(path, _Known(path, self._new()))
            self._known.move_to_end(path)
            return known

    def _read_on(self, known: _Known[R], file: BinaryIO) -> None:
        found = os.fstat(file.fileno())
        if not known.fits(file, found):
            known.reading, known.position = self._new(), 0
        known.device, known.inode = found.st_dev, found.st_ino
        known.position = known.reading.read(file, known.position, found.st_size)
        start = max(0, known.position - SEAM_BYTES)
        known.seam = os.pread(file.fileno(), known.position - start, start)

    def _forget(self, newest: _Known[R]) -> None:
        """Count the memory of a reading, and forget others until the rest fits."""
        with self._lock:
            if self._known.get(newest.path) is not newest:  # forgotten while it read; nobody will find it again
                return
            self._size_bytes += newest.reading.size_bytes - newest.counted_bytes
            newest.counted_bytes = newest.reading.size_bytes
            while len(self._known) > 1 and (len(self._known) > self._most_files or self._size_bytes > self._most_bytes):
                path, oldest = next(iter(self._known.items()))
                if oldest is newest:
                    self._known.move_to_end(path)
                    continue
                del self._known[path]
                self._size_bytes -= oldest.counted_bytes
