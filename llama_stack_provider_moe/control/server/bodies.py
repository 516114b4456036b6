"""Parses and checks request bodies in threads, off the event loop.

JSON parsing in C, and pydantic, hold the GIL for the whole call, so threads alone do not help. Therefore the number of
values in a body is bounded before anything else reads it, and large bodies are parsed one at a time.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from fastapi import HTTPException as FastAPIError
from fastapi import Request
from starlette.types import Message, Receive

from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.errors import InvalidBody

MAX_VALUES = 50_000  # in all objects and lists; the largest sensible job has rules for about 20,000 experts
MAX_DEPTH = 64
LARGE_BYTES = 64 << 10
REST_S = 1.0  # longest pause after a large body
_OPENING = (b"{", b"[", b",")


class Bodies:
    """Reads request bodies; small ones don't wait for large ones."""

    def __init__(self) -> None:
        self._small = Pool("moe-body", 1, 1024, "requests")
        self._large = Pool("moe-large-body", 1, 128, "large requests")

    async def run[*Args, T](self, size_bytes: int, call: Callable[[*Args], T], *args: *Args) -> T:
        """Return `call(*args)`, run in a thread for bodies of that size."""
        if size_bytes > LARGE_BYTES:
            return await self._large.run(_and_rest, partial(call, *args))
        return await self._small.run(call, *args)

    def close(self) -> None:
        """Stop reading."""
        self._small.close()
        self._large.close()


def _and_rest[T](call: Callable[[], T]) -> T:
    """Return `call()`, then sleep for as long as it took, so that the other threads get their turn."""
    began = time.monotonic()
    try:
        return call()
    finally:
        time.sleep(min(REST_S, time.monotonic() - began))


class BoundedRequest(Request):
    """A request with a body of at most `limit_bytes`, which a thread parses."""

    def __init__(self, request: Request, limit_bytes: int, bodies: Bodies) -> None:
        super().__init__(request.scope, _bounded(request.receive, limit_bytes))
        self._bodies = bodies

    async def json(self) -> object:
        """Return the content of the body.

        Raises:
            JSONDecodeError: the body is not JSON.
            InvalidBody: the body can't be read, or has too many values.
        """
        body = await self.body()
        return await self._bodies.run(len(body), parsed, body)


def parsed(body: bytes) -> object:
    """Return the content of a JSON text with at most `MAX_VALUES` values, nested at most `MAX_DEPTH` deep.

    Raises:
        JSONDecodeError: the text is not JSON.
        InvalidBody: it exceeds a limit, has a number that is too long to read, or is not UTF-8.
    """
    # The factor is there because strings contain some of these characters; an exact count needs the text parsed.
    if sum(body.count(sign) for sign in _OPENING) > 4 * MAX_VALUES:
        raise _too_much()
    try:
        content = json.loads(body)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # not UTF-8, or an integer with more digits than Python reads
        raise InvalidBody([f"the body can't be read ({error})"]) from None
    _check(content)
    return content


def _check(content: object) -> None:
    level, count, depth = [content], 0, 0
    while level:
        count += len(level)
        if count > MAX_VALUES:
            raise _too_much()
        if depth > MAX_DEPTH:
            raise _too_deep()
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
        level, depth = below, depth + 1


def _too_much() -> InvalidBody:
    return InvalidBody([f"the body has more than {MAX_VALUES:,} values; rows of a job belong in a data set"])


def _too_deep() -> InvalidBody:
    return InvalidBody([f"the body is nested more than {MAX_DEPTH} levels deep"])


def _bounded(receive: Receive, limit_bytes: int) -> Receive:
    """Wrap `receive` so that it raises once the body exceeds `limit_bytes`; memory holds no more than that."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit_bytes:
            raise FastAPIError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has more than {limit_bytes} bytes (`max_body_bytes` of this server); rows of a job "
                "belong in a data set",
            )
        return message

    return bounded
