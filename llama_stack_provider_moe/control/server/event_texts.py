"""Events as the text that followers get, made once for all of them.

The followers of a job get the same events at different moments, and each would parse and write them again. This module
keeps the text of each line that it saw, by the line itself: another file can't get a text that is not its own.
"""

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from llama_stack_provider_moe.control.server import timeline
from llama_stack_provider_moe.control.server.safe_json import dumps

# A stream sends as many at a time: a page of routing tables can be megabytes.
STREAMED_EVENTS = 200
MOST_BYTES = 32 << 20  # of lines and their texts


class EventText(NamedTuple):
    """What is new for a follower.

    Attributes:
        text: the events and the cursor as JSON; None without any event.
        position: the byte to continue from.
    """

    text: str | None
    position: int


class EventTexts:
    """The texts of one server process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._size_bytes = 0

    def page(self, path: Path, start: int, types: frozenset[str]) -> EventText:
        """Return the events from a byte on, `STREAMED_EVENTS` at most.

        Args:
            path: the file with a job's events; a missing one has none.
            start: the byte.
            types: types of the events; none: any.
        """
        found = timeline.cut(path, start, STREAMED_EVENTS, types, self._text)
        text = f'{{"events": [{", ".join(found.events)}], "cursor": {found.cursor}}}' if found.events else None
        return EventText(text, found.cursor)

    def _text(self, line: bytes, types: frozenset[str]) -> str | None:
        with self._lock:
            known = self._texts.get(line)
            if known is not None:
                self._texts.move_to_end(line)
                return known
        event = timeline.event_of(line, types)
        if event is None:
            return None
        text = dumps(event)
        with self._lock:
            if line not in self._texts:
                self._texts[line] = text
                self._size_bytes += len(line) + len(text)
            while self._size_bytes > MOST_BYTES:
                old, forgotten = self._texts.popitem(last=False)
                self._size_bytes -= len(old) + len(forgotten)
        return text
