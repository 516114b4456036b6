"""JSON that is taken for nothing else: no browser finds HTML in it, and no terminal a sequence that it obeys.

What a training process printed, and names that callers chose, reach an administrator's browser and `curl` in here.
"""

import json
from typing import Any

from fastapi import Response

MEDIA_TYPE = "application/json"
# Outside of its strings JSON has none of these; inside, the escape means the same.
_ESCAPED = {"<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "\x7f": r"\u007f"}


def dumps(content: Any) -> str:
    """`content` in ASCII, without control characters and without what begins a tag or an entity."""
    return _escaped(json.dumps(content, allow_nan=False))


def made_safe(response: Response) -> Response:
    """The same answer, which no browser takes for another type; where it is JSON, it says the same in `dumps`'s way."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.media_type == MEDIA_TYPE:
        text = bytes(response.body).decode()
        response.body = _escaped(text if text.isascii() else json.dumps(json.loads(text))).encode("ascii")
        response.headers["Content-Length"] = str(len(response.body))
    return response


def _escaped(text: str) -> str:
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return text
