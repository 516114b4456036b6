"""Logs unexpected exceptions from a separate thread, with bounded length and rate.

The host's logger renders an exception with Rich: every frame and every local, 3 seconds of processor time that blocks
everything else. Therefore this module formats a bounded traceback itself and logs plain text.
"""

import logging
import queue
import threading
import time
import traceback
from typing import NamedTuple

MAX_FRAMES = 12  # last frames of each exception in a chain
MAX_TEXT = 6000  # characters of a traceback
REPEAT_S = 60.0  # seconds between two full tracebacks of the same exception from the same line
WAITING = 64
log = logging.getLogger(__name__)


class _Failure(NamedTuple):
    what: str
    error: BaseException


class Failures:
    """Logs unexpected exceptions."""

    def __init__(self) -> None:
        self._queue: queue.Queue[_Failure | None] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._dropped = 0
        self._logged_at: dict[tuple[str, str, int], float] = {}

    def report(self, what: str, error: BaseException) -> None:
        """Queue a log entry that `what` failed with `error`; returns at once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="moe-failures", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(_Failure(what, error))
        except queue.Full:
            with self._lock:
                self._dropped += 1

    def close(self, limit_s: float = 2.0) -> None:
        """Log the queued failures, for at most `limit_s` seconds."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._queue.put(None, timeout=limit_s)
            except queue.Full:
                return
            thread.join(limit_s)

    def _work(self) -> None:
        while (failure := self._queue.get()) is not None:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            more = f" (and {dropped} more failures before it, too many to log)" if dropped else ""
            # %r: a path may contain control sequences for the terminal that shows the log.
            log.error("%r failed%s: %s", failure.what, more, self._text(failure.error))
            del failure  # it holds the frames of a request

    def _text(self, error: BaseException) -> str:
        summary = f"{type(error).__name__}: {str(error)[:300]!r}"
        last = traceback.extract_tb(error.__traceback__, limit=-1)
        where = (type(error).__name__, last[0].filename, last[0].lineno or 0) if last else (type(error).__name__, "", 0)
        now = time.monotonic()
        if now - self._logged_at.get(where, -REPEAT_S) < REPEAT_S:
            return f"{summary} ({where[1]}:{where[2]}, as before)"
        if len(self._logged_at) > 1000:
            self._logged_at.clear()
        self._logged_at[where] = now
        text = "".join(traceback.TracebackException.from_exception(error, limit=-MAX_FRAMES, compact=True).format())
        cut = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT // 2]}\n...\n{text[-MAX_TEXT // 2 :]}"
        return f"{summary}\n{cut}"
