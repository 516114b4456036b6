"""Server-sent events out of lines, as far as this API uses them: one line of JSON an event."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llama_stack_provider_moe.errors import ServerRefused


class Event(NamedTuple):
    """One event; `name` is `message` where the server gives none."""

    name: str
    data: dict[str, Any]


def events(lines: Iterable[str]) -> Iterator[Event]:
    """The events in `lines`; comments are passed over, and so is an event without the empty line that ends it."""
    name, data = "message", ""
    for line in lines:
        field, _, value = line.partition(":")
        if not line and data:
            yield Event(name, _document(data))
        if not line:
            name, data = "message", ""
        elif field == "event":
            name = value.strip()
        elif field == "data":
            data += value


def _document(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerRefused("the server sends events that this version does not know", 200)
    return found
