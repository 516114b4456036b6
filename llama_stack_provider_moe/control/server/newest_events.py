"""The newest event of each type, without reading the end of a file again at each look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llama_stack_provider_moe.control.server.remembered import Remembered
from llama_stack_provider_moe.jobdir.events import ENDS, newest_of

WINDOW_BYTES = 1 << 20  # a look at more reads the end alone
MOST_FILES = 512
MOST_BYTES = 64 << 20
MEMORY_PER_BYTE = 4  # of a parsed event, for each byte of its line


class NewestEvents:
    """The newest event of each type in one file, newest first; ends of an earlier start are left out."""

    def __init__(self) -> None:
        self.events: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def read(self, file: BinaryIO, start: int, end: int) -> int:
        """Read whole lines between two bytes of the file, the last `WINDOW_BYTES` at most; return where they end."""
        begin = max(start, end - WINDOW_BYTES)
        file.seek(begin)
        content = file.read(end - begin)
        whole = content.rfind(b"\n") + 1
        # The first piece may have begun before the window.
        lines = content[:whole].split(b"\n")[1 if begin > start else 0 :]
        found = newest_of(lines)
        hidden = set(ENDS) if "started" in found else set()
        kept = {name: event for name, event in self.events.items() if name not in found and name not in hidden}
        self.events = found | kept
        self._sizes = {name: self._sizes.get(name, 0) for name in self.events}
        self._sizes.update(dict.fromkeys(found, max(map(len, lines), default=0)))
        return begin + whole if whole or begin == start else end

    @property
    def size_bytes(self) -> int:
        """About how much memory this needs."""
        return MEMORY_PER_BYTE * sum(self._sizes.values())


_remembered = Remembered(NewestEvents, MOST_FILES, MOST_BYTES)


def newest_events(path: Path) -> Mapping[str, Any]:
    """Return the newest event of each type by its name, newest first; nothing for a missing file."""
    with _remembered.of(path) as (newest, _):
        return newest.events
