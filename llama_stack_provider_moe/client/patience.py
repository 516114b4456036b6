"""How long a client waits: for the end of a job, and for a server that is restarted."""

import time
from collections.abc import Callable
from http import HTTPStatus

from llama_stack_provider_moe.client.documents import Status
from llama_stack_provider_moe.errors import MoeError, ServerLost, ServerRefused

POLL_S = 1.0
# A restarted server is back within this time; its jobs continue meanwhile.
PATIENCE_S = 60.0
ENDED = frozenset({"completed", "failed", "cancelled", "unreadable"})


def has_ended(status: Status) -> bool:
    """Return whether a job has ended, in whatever state; or whether the server can't read its state."""
    return status["status"] in ENDED


class Deadline:
    """A limit of time.

    Args:
        limit_s: seconds from now; None: no limit.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()

    def check(self, what: str) -> None:
        """Raise `TimeoutError`, whose text begins with `what`, if the time is over."""
        if self._limit_s is not None and time.monotonic() - self._began >= self._limit_s:
            raise TimeoutError(f"{what} within {self._limit_s:g} seconds")


class Patience:
    """Bears a server that is gone for a while, once it has answered.

    Args:
        limit_s: seconds without an answer after which to give up.
        note: called with a message when the server is lost, and when it answers again; None: nobody is told.
    """

    def __init__(self, limit_s: float = PATIENCE_S, note: Callable[[str], None] | None = None) -> None:
        self._note = note
        self._limit_s = limit_s
        self._has_answered = False
        self._lost_at: float | None = None

    def answered(self) -> None:
        """Say that the server has answered."""
        if self._lost_at is not None and self._note is not None:
            self._note("the server answers again")
        self._has_answered, self._lost_at = True, None

    def lost(self, error: MoeError) -> None:
        """Raise `error` if the server refused, never answered, or was gone for too long."""
        is_gone = isinstance(error, ServerLost) or (
            isinstance(error, ServerRefused) and error.answered >= HTTPStatus.INTERNAL_SERVER_ERROR
        )
        if not is_gone or not self._has_answered:
            raise error
        moment = time.monotonic()
        if self._lost_at is None:
            self._lost_at = moment
            if self._note is not None:
                self._note(f"{error}; trying again for {self._limit_s:g} s")
        if moment - self._lost_at >= self._limit_s:
            raise error
