"""Parses server-sent events, as far as this API uses them: one line of JSON per event."""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_stack_provider_moe.errors import ServerRefused


class Event(NamedTuple):
    """One event; `name` is `message` if the server sends none."""

    name: str
    data: dict[str, object]


class Parser:
    """Makes events of lines. Comments are skipped, and so is an event without its final empty line."""

    def __init__(self) -> None:
        self._name, self._data = "message", ""

    def feed(self, line: str) -> Event | None:
        """Take the next line; return the event that it completes, if any."""
        field, _, value = line.partition(":")
        if not line:
            found = Event(self._name, _document(self._data)) if self._data else None
            self._name, self._data = "message", ""
            return found
        if field == "event":
            self._name = value.strip()
        elif field == "data":
            self._data += value
        return None


def events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events in `lines`."""
    parser = Parser()
    for line in lines:
        event = parser.feed(line)
        if event is not None:
            yield event


def _document(data: str) -> dict[str, object]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerRefused("the server sent an event that this version does not know", 200)
    return found
