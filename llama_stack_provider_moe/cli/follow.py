"""A job's states and its output, as they come, until it has ended. Short outages of the server are waited out."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import Any

from llama_stack_provider_moe.cli.exits import Exit, exit_of
from llama_stack_provider_moe.cli.server import Server, state_of
from llama_stack_provider_moe.cli.sse import Event
from llama_stack_provider_moe.errors import ServerLost, ServerRefused

POLL_S = 1.0
# A server that is restarted comes back within this time; its jobs go on meanwhile.
PATIENCE_S = 60.0


class Follower:
    """Looks at one job again and again.

    Args:
        server: that has it.
        job_id: its name.
        note: told when the server stops answering, and when it answers again.
        poll_s: seconds between two looks.
        patience_s: seconds without an answer after which it is given up. The very first look gets none.
    """

    def __init__(
        self,
        server: Server,
        job_id: str,
        note: Callable[[str], None],
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._server = server
        self._job_id = job_id
        self._note = note
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._answered = False

    def statuses(self) -> Iterator[dict[str, Any]]:
        """Status documents, each unlike the one before; the last one's job has ended."""
        last = None
        while True:
            status = self._look(lambda: self._server.status(self._job_id))
            if status != last:
                yield status
            if state_of(status).ended:
                return
            last = status
            time.sleep(self._poll_s)

    def output(self, tail: int | None) -> Iterator[dict[str, Any]]:
        """Log documents that have lines, from the last `tail` on, until the job has ended and all of it was given."""
        offset: int | None = None
        while True:
            with ExitStack() as stack:
                opened = self._opened(stack, tail, offset)
                if opened is None:  # a server of an earlier version
                    yield from self._asked_again_and_again(tail)
                    return
                with suppress(ServerLost):  # while it was read: it is opened again where it broke off
                    for event in opened:
                        if event.name == "end":
                            return
                        if event.name == "error":
                            raise ServerRefused(str(event.data["error"]["message"]), HTTPStatus.NOT_FOUND)
                        offset = int(event.data["next_offset"])
                        yield event.data
            time.sleep(self._poll_s)

    def _opened(self, stack: ExitStack, tail: int | None, offset: int | None) -> Iterator[Event] | None:
        return self._look(lambda: stack.enter_context(self._server.follow(self._job_id, tail, offset)))

    def _asked_again_and_again(self, tail: int | None) -> Iterator[dict[str, Any]]:
        offset: int | None = None
        while True:
            ended = state_of(self._look(lambda: self._server.status(self._job_id))).ended  # before its last output
            piece = self._piece(tail, offset)
            if piece["log_lines"]:
                yield piece
            if ended and piece["next_offset"] == offset:
                return
            offset = piece["next_offset"]
            if not ended:
                time.sleep(self._poll_s)

    def _piece(self, tail: int | None, offset: int | None) -> dict[str, Any]:
        return self._look(lambda: self._server.logs(self._job_id, tail=tail if offset is None else None, offset=offset))

    def _look[Answer](self, ask: Callable[[], Answer]) -> Answer:
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
