"""Log the failures of a loop that retries: each failure once, and known ones in a single line."""

import logging
import time
from pathlib import Path

from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store_errors import brief, is_disk_full, is_store_lost
from llama_stack_provider_moe.ground.redaction import without_passwords

# A lasting failure is logged again after this time.
AGAIN_S = 600.0
RECORD_LIMIT = 8000  # characters


class BoundedFormatter(logging.Formatter):
    """Formats records without passwords, and cuts long ones."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return without_passwords(super().format(record))[:RECORD_LIMIT]


class FailureLog:
    """Writes failures to a log.

    Args:
        log: The log.
        folder: A folder on the disk that may be full.
    """

    def __init__(self, log: logging.Logger, folder: Path) -> None:
        self._log = log
        self._folder = folder
        self._reported: dict[str, float] = {}  # failure -> when it was logged (time.monotonic())

    def report(self, error: Exception, consequence: str) -> None:
        """Log one line for a full disk or a store that does not answer, and a traceback for an unexpected error.

        Args:
            error: The exception that is being handled.
            consequence: What follows from it, for the reader.
        """
        lost = is_store_lost(error)
        # A full disk may cause other errors, such as "disk I/O error".
        full = disk.full_by(error, self._folder) if lost or isinstance(error, OSError) or is_disk_full(error) else None
        line: str | None
        if full is not None:
            key, line = "full", full
        elif lost:
            key = line = f"the job store does not answer ({brief(error)})"
        else:
            key, line = f"{type(error).__name__}: {error}", None
        last = self._reported.get(key)
        if last is not None and time.monotonic() - last < AGAIN_S:
            return
        self._reported[key] = time.monotonic()
        if line is not None:
            self._log.warning("%s; %s", line, consequence)
        elif last is None:
            self._log.exception("an unexpected error occurred; %s", consequence)
        else:
            self._log.error("%s, as before; %s", key, consequence)

    def recovered(self) -> None:
        """Note that everything works again; later failures are logged anew."""
        if self._reported:
            self._reported.clear()
            self._log.info("the failed operations work again")
