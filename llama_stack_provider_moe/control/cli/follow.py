"""Follows a job's states and output until it has ended. Waits through short outages of the server."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import cast

from llama_stack_provider_moe.client.documents import LogLines, Status
from llama_stack_provider_moe.client.sse import Event
from llama_stack_provider_moe.control.cli.client import Client, state_of
from llama_stack_provider_moe.control.cli.exits import Exit, exit_of
from llama_stack_provider_moe.errors import ServerLost, ServerRefused

POLL_S = 1.0
# A restarted server is back within this time; its jobs continue meanwhile.
PATIENCE_S = 60.0


class Follower:
    """Polls one job.

    Args:
        server: the server that has the job.
        job_id: name of the job.
        note: called with a message when the server stops answering, and when it answers again.
        poll_s: seconds between two requests.
        patience_s: seconds without an answer before giving up. The first request is not repeated.
    """

    def __init__(
        self,
        server: Client,
        job_id: str,
        note: Callable[[str], None],
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._server = server
        self._job_id = job_id
        self._poll_s = poll_s
        self._ask = Patience(note, poll_s, patience_s).ask

    def statuses(self) -> Iterator[Status]:
        """Yield each status document that differs from the one before; in the last one the job has ended."""
        last = None
        while True:
            status = self._ask(lambda: self._server.status(self._job_id))
            if status != last:
                yield status
            if state_of(status).over:
                return
            last = status
            time.sleep(self._poll_s)

    def output(self, tail: int | None) -> Iterator[LogLines]:
        """Yield log documents with new lines, from the last `tail` lines on, until the job has ended."""
        offset: int | None = None
        while True:
            with ExitStack() as stack:
                opened = self._opened(stack, tail, offset)
                if opened is None:  # an older server
                    yield from self._polled_output(tail)
                    return
                with suppress(ServerLost):  # the stream broke: open it again at the same place
                    for event in opened:
                        if event.name == "end":
                            return
                        if event.name == "error":
                            raise ServerRefused(_message_of(event), HTTPStatus.NOT_FOUND)
                        piece = cast(LogLines, event.data)
                        offset = int(piece["next_offset"])
                        yield piece
            time.sleep(self._poll_s)

    def _opened(self, stack: ExitStack, tail: int | None, offset: int | None) -> Iterator[Event] | None:
        return self._ask(lambda: stack.enter_context(self._server.follow(self._job_id, tail, offset)))

    def _polled_output(self, tail: int | None) -> Iterator[LogLines]:
        offset: int | None = None
        while True:
            ended = state_of(
                self._ask(lambda: self._server.status(self._job_id))
            ).over  # asked before its last output is read
            piece = self._piece(tail, offset)
            if piece["log_lines"]:
                yield piece
            if ended and piece["next_offset"] == offset:
                return
            offset = piece["next_offset"]
            if not ended:
                time.sleep(self._poll_s)

    def _piece(self, tail: int | None, offset: int | None) -> LogLines:
        return self._ask(lambda: self._server.logs(self._job_id, tail=tail if offset is None else None, offset=offset))


class Patience:
    """Repeats a request while the server does not answer.

    Args:
        note: called with a message when the server stops answering, and when it answers again.
        poll_s: seconds between two requests.
        patience_s: seconds without an answer before giving up. The first request is not repeated.
    """

    def __init__(self, note: Callable[[str], None], poll_s: float = POLL_S, patience_s: float = PATIENCE_S) -> None:
        self._note = note
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._answered = False

    def ask[Answer](self, ask: Callable[[], Answer]) -> Answer:
        """Return what `ask` returns, once it does."""
        lost_at: float | None = None
        while True:
            try:
                answer = ask()
            except (ServerLost, ServerRefused) as error:
                if not self._answered or exit_of(error) is not Exit.LOST:
                    raise
                moment = time.monotonic()
                if lost_at is None:
                    lost_at = moment
                    self._note(f"{error}; trying again for {self._patience_s:g} s")
                if moment - lost_at >= self._patience_s:
                    raise
                time.sleep(self._poll_s)
                continue
            if lost_at is not None:
                self._note("the server answers again")
            self._answered = True
            return answer


def _message_of(event: Event) -> str:
    error = event.data.get("error")
    return str(error.get("message") if isinstance(error, dict) else error)
