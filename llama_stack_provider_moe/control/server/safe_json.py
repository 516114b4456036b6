"""JSON without characters that a browser could read as HTML or a terminal as a control sequence.

Answers contain the output of training processes and names that callers chose, and administrators see them in a browser
or with `curl`.
"""

import json

from fastapi import Response
from pydantic import BaseModel

MEDIA_TYPE = "application/json"
# JSON has these only inside strings, where the escape means the same.
_ESCAPED = {"<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "\x7f": r"\u007f"}


def dumps(content: object) -> str:
    """Return `content` as ASCII JSON, without control characters, angle brackets and ampersands."""
    return _escaped(json.dumps(content, allow_nan=False))


class SafeJSON(Response):
    """A JSON answer written like `dumps`."""

    media_type = MEDIA_TYPE


def of_model(content: BaseModel, exclude_defaults: bool = False) -> Response:
    """Return `content` as an answer; the time grows with its size."""
    return SafeJSON(_safe(content.model_dump_json(by_alias=True, exclude_defaults=exclude_defaults)))


def made_safe(response: Response) -> Response:
    """Stop browsers from guessing the type of `response`, and rewrite a JSON answer like `dumps`."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.media_type == MEDIA_TYPE and not isinstance(response, SafeJSON):
        text = bytes(response.body).decode()
        response.body = _safe(text).encode("ascii")
        response.headers["Content-Length"] = str(len(response.body))
    return response


def _safe(text: str) -> str:
    return _escaped(text if text.isascii() else json.dumps(json.loads(text)))


def _escaped(text: str) -> str:
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return text
