"""A job's output as server-sent events, until the job has ended.

    id: 1287                                                  bytes of the output up to here
    data: {"log_lines": ["step 3", ...], "next_offset": 1287}

    event: end
    data: {"job_uuid": "...", "status": "completed"}

A browser's EventSource, or anything else that sends `Last-Event-ID` when it connects again, misses nothing and sees
nothing twice. A stream that stops without `end` was cut off; the job goes on, and so may the reader.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.host import compat
from llama_stack_provider_moe.host.safe_json import dumps
from llama_stack_provider_moe.host.views import LOG_WINDOW_BYTES
from llama_stack_provider_moe.host.wire import PostTrainingJobLogStream
from llama_stack_provider_moe.jobs.state import JobState

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
POLL_S = 0.5
# Proxies close connections that are silent for a minute or so; and only a write tells that a reader has gone.
HEARTBEAT_S = 15.0


class Look(NamedTuple):
    """What one look at a job found."""

    state: JobState
    piece: PostTrainingJobLogStream


async def output(look: Callable[[int | None], Look], offset: int | None) -> AsyncIterator[bytes]:
    """The stream's bytes.

    Args:
        look: the job's state, and after that the lines from a byte on (None: the last ones); may block. Raises
            NotFound once the job is deleted.
        offset: byte to begin at.
    """
    silent_s = 0.0
    yield b": output follows\n\n"  # the reader's first sign of life, also of a job that waits
    while not compat.is_stopping():  # uvicorn waits for its connections before it lets go
        try:
            found = await asyncio.to_thread(look, offset)
        except NotFound as error:
            yield _event({"error": {"message": str(error)}}, name="error")
            return
        piece, silent_s = found.piece, silent_s + POLL_S
        if piece.log_lines:
            data = {"log_lines": piece.log_lines, "next_offset": piece.next_offset}
            yield _event(data, number=piece.next_offset)
            silent_s = 0.0
        elif silent_s >= HEARTBEAT_S:
            yield b": waiting\n\n"
            silent_s = 0.0
        if found.state.ended and piece.next_offset == offset:
            yield _event({"job_uuid": piece.job_uuid, "status": found.state.value}, name="end")
            return
        behind = offset is not None and piece.next_offset - offset > LOG_WINDOW_BYTES // 2
        offset = piece.next_offset
        if not found.state.ended and not behind:
            await asyncio.sleep(POLL_S)


def _event(data: dict[str, Any], name: str | None = None, number: int | None = None) -> bytes:
    head = ("" if name is None else f"event: {name}\n") + ("" if number is None else f"id: {number}\n")
    # ASCII, so that no separator of lines that Unicode knows stands in it.
    return f"{head}data: {dumps(data)}\n\n".encode("ascii")
