"""A job's output, or its events, as server-sent events until the job has ended.

    id: 1287                                                  bytes of the file up to here
    data: {"log_lines": ["step 3", ...], "next_offset": 1287}     or {"events": [...], "cursor": 1287}

    event: end
    data: {"job_uuid": "...", "status": "completed"}

A browser's EventSource, or any client that sends `Last-Event-ID` when it reconnects, gets every line exactly once. A
stream that stops without `end` was interrupted; the job continues, and the client can reconnect.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.failures import Failures
from llama_stack_provider_moe.control.server.safe_json import dumps
from llama_stack_provider_moe.control.server.views import LOG_WINDOW_BYTES
from llama_stack_provider_moe.control.server.wire import PostTrainingJobLogStream
from llama_stack_provider_moe.control.store.store_errors import is_store_lost
from llama_stack_provider_moe.errors import MoeError, Unavailable
from llama_stack_provider_moe.jobdir.state import JobState

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
POLL_S = 0.5
TOKEN_POLL_S = 0.1  # of an answer, whose tokens a person reads as they come
LOST_POLL_S = 5.0  # while the store does not answer
LOOKS_A_SECOND = 40.0  # limit for all followers together; with many followers, each gets its lines later
# Proxies close connections that are silent for about a minute, and only a write shows that a client has gone.
HEARTBEAT_S = 15.0


class OutputPage(NamedTuple):
    """How a job, or a part of it, stands at one moment, and what is new in a file of it.

    Attributes:
        is_over: whether nothing more will come.
        status: how it stands, for the end of the stream.
        job_uuid: the job's name.
        text: what a client gets, as JSON; None if nothing is new. The thread that looks makes it, because a page of
            events can be megabytes.
        position: bytes of the file up to here.
    """

    is_over: bool
    status: str
    job_uuid: str
    text: str | None
    position: int


Look = Callable[[int | None], OutputPage]


def page_of_output(state: JobState, piece: PostTrainingJobLogStream) -> OutputPage:
    """Return lines of a job's output as a page."""
    text = dumps({"log_lines": piece.log_lines, "next_offset": piece.next_offset}) if piece.log_lines else None
    return OutputPage(state.over, state.value, piece.job_uuid, text, piece.next_offset)


class Followers:
    """The clients that follow jobs' output on this server; together they poll at most `LOOKS_A_SECOND` times a second.

    Args:
        run: runs a look, which may block, in a thread.
        failures: logs unexpected errors; the client only learns that one occurred.
    """

    def __init__(self, run: Callable[[Look, int | None], Awaitable[OutputPage]], failures: Failures) -> None:
        self._run = run
        self._failures = failures
        self._count = 0

    async def output(self, look: Look, offset: int | None, poll_s: float | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes of the stream.

        Args:
            look: returns the job's state, and what is new from a byte on (None for the last lines of the output); it
                reads the state first. May block. Raises NotFound once the job is deleted.
            offset: the byte to begin at.
            poll_s: seconds between two looks, if there are few followers; None: `POLL_S`.
        """
        self._count += 1
        try:
            async for piece in self._pieces(look, offset, poll_s):
                yield piece
        finally:
            self._count -= 1

    @property
    def _poll_s(self) -> float:
        return max(POLL_S, self._share_s)

    @property
    def _share_s(self) -> float:
        return self._count / LOOKS_A_SECOND

    async def _pieces(self, look: Look, offset: int | None, least_s: float | None) -> AsyncIterator[bytes]:
        silent_s = 0.0
        yield b": output follows\n\n"  # a first sign of life, even for a job that waits
        while not compat.is_stopping():  # uvicorn waits for its connections before it ends
            poll_s = self._poll_s if least_s is None else max(least_s, self._share_s)
            try:
                found = await self._run(look, offset)
            except Exception as error:  # noqa: BLE001  # the host would send its own answer in the middle of ours
                if isinstance(error, Unavailable) or is_store_lost(error):  # otherwise the client would just reconnect
                    yield b": waiting for the server's store\n\n"
                    await _slept(LOST_POLL_S)
                    continue
                text = str(error)
                if not isinstance(error, MoeError):
                    self._failures.report("a stream of output", error)
                    text = "the server failed on an unexpected error; see the server's log"
                yield _event(dumps({"error": {"message": text}}), name="error")
                return
            silent_s += poll_s
            if found.text is not None:
                yield _event(found.text, number=found.position)
                silent_s = 0.0
            elif silent_s >= HEARTBEAT_S:
                yield b": waiting\n\n"
                silent_s = 0.0
            if found.is_over and found.position == offset:
                yield _event(dumps({"job_uuid": found.job_uuid, "status": found.status}), name="end")
                return
            behind = offset is not None and found.position - offset > LOG_WINDOW_BYTES // 2
            offset = found.position
            if not found.is_over and not behind:
                await _slept(poll_s)


async def _slept(duration_s: float) -> None:
    """Sleep, but return early when the server shuts down."""
    for _ in range(max(1, round(duration_s / 0.5))):
        if compat.is_stopping():
            return
        await asyncio.sleep(min(duration_s, 0.5))


def _event(data: str, name: str | None = None, number: int | None = None) -> bytes:
    head = ("" if name is None else f"event: {name}\n") + ("" if number is None else f"id: {number}\n")
    # `dumps` writes ASCII, so that the text contains none of Unicode's line separators.
    return f"{head}data: {data}\n\n".encode("ascii")
