"""`ForkserverKeeper`: keeps one forkserver running, and replaces one that died after a delay.

A forkserver only saves time: without one, jobs start cold. A forkserver that dies repeatedly must not take processor
time from the jobs. So each failure doubles the delay before the next start, up to ten minutes.
"""

import logging
import time
from collections.abc import Callable

from llama_stack_provider_moe.control.supervisor.executors.forkserver import LOG_NAME, Forkserver, Readiness

FIRST_WAIT_S = 5.0
LONGEST_WAIT_S = 600.0

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class ForkserverKeeper:
    """Starts the forkserver when it is first needed, and replaces one that has ended.

    Args:
        start: Starts a forkserver.
    """

    def __init__(self, start: Callable[[], Forkserver]) -> None:
        self._start = start
        self._asked = False
        self._ready_s: float | None = None  # time.monotonic() when the current one was first seen ready
        self._due_s = 0.0  # time.monotonic() of the next start
        self.failures = 0  # consecutive failures
        self.current: Forkserver | None = None
        self.unavailable_reason = ""

    def readiness(self) -> Readiness:
        """Return whether a child can be forked now. Only the first forkserver is ever reported as IMPORTING.

        A job waits for the first forkserver's imports, which take no longer than its own would. It does not wait for a
        later forkserver, which may never get ready.
        """
        self._asked = True
        self.maintain()
        if self.current is None:
            return Readiness.GONE
        readiness = self.current.readiness()
        if readiness is Readiness.READY and self._ready_s is None:
            self._ready_s = time.monotonic()
        if readiness is Readiness.IMPORTING and self.failures:
            self.unavailable_reason = "the next forkserver is still importing"
            return Readiness.GONE
        return readiness

    def maintain(self) -> None:
        """Detect an ended forkserver, and start the next one when it is due; do nothing before it is first needed."""
        if self.current is not None and self.current.readiness() is Readiness.GONE:
            why, self.current = self.current.end_reason, None
            self._failed(why)
        if self.current is None and self._asked and time.monotonic() >= self._due_s:
            self._ready_s = None
            try:
                self.current = self._start()
            except OSError as error:  # no such interpreter, no room for a log, ...
                self._failed(f"it could not be started: {error}")

    def wait_s(self) -> float:
        """Return the seconds until the next start; 0 while a forkserver runs."""
        return 0.0 if self.current is not None else max(0.0, self._due_s - time.monotonic())

    def _failed(self, why: str) -> None:
        if self._ready_s is not None and time.monotonic() - self._ready_s >= LONGEST_WAIT_S:
            self.failures = 0  # it worked for long enough
        self.failures += 1
        wait_s = min(FIRST_WAIT_S * 2 ** min(self.failures - 1, 16), LONGEST_WAIT_S)
        self._due_s = time.monotonic() + wait_s
        self.unavailable_reason = why
        log.warning(
            "the forkserver has ended: %s; see %s. Jobs start cold until there is another one; the next start, after "
            "%d failure(s), is in %g s", why, LOG_NAME, self.failures, wait_s,
        )  # fmt: skip
