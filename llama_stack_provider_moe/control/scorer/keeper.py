"""Keeps a scorer process running: starts it, checks that it answers, kills one that hangs, replaces one that ended."""

import fcntl
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from llama_stack_provider_moe.control.scorer.process import LOG_NAME, MODULE, ScorerProcess, ping
from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scorer_wire import WireError
from llama_stack_provider_moe.shields.scores import ScorerHealth, ScorerStatus

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 300.0
LOCK_NAME = "scorer.lock"

log = logging.getLogger(__name__)


class ScorerKeeper:
    """A thread that keeps one scorer process for all servers of a state folder.

    The server that has the lock in the folder starts the process and watches it; the others use it, and take over when
    that server ends. It is a thread and not a task, because llama-stack initialises a provider in an event loop that it
    then discards. Each failure doubles the wait before the next start, from 1 s up to five minutes.

    Args:
        settings: of the scorer.
        folder: of the socket, the lock and the log; it is created.
        environment: of the scorer process.
        module: that it runs; tests use others.
    """

    def __init__(
        self, settings: ScorerSettings, folder: Path, environment: Mapping[str, str], module: str = MODULE
    ) -> None:
        self._settings, self._folder = settings, folder
        self._environment, self._module = dict(environment), module
        self._closed = threading.Event()
        self._lock: BinaryIO | None = None
        self._due_s = 0.0  # time.monotonic() of the next start
        self._ready_s: float | None = None  # time.monotonic() when the current process was first seen ready
        self._failures = 0  # consecutive ones
        self._restarts = 0
        self._health = ScorerHealth("starting", "the scorer has not been started yet", (), 0, 0)
        self._thread = threading.Thread(target=self._watch, name="moe-scorer-keeper", daemon=True)
        self.process: ScorerProcess | None = None

    def start(self) -> None:
        """Begin to keep a scorer."""
        Privacy().make_folder(self._folder)
        self._folder.chmod(0o700)
        self._thread.start()

    def close(self) -> None:
        """End the scorer, if it is this server's."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.process is not None:
            self.process.kill()
            self.process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._health = ScorerHealth("down", "the server has closed", (), 0, self._restarts)

    def health(self) -> ScorerHealth:
        """The state at the last check."""
        return self._health

    def _watch(self) -> None:
        while True:
            try:
                if self._owns():
                    self._maintain()
                else:
                    self._check(None)
            except OSError as error:  # no room, or no right, to make or lock a file in the folder
                self._report("down", f"the scorer's folder can't be used: {error}")
            if self._closed.wait(self._settings.ping_s):
                return

    def _owns(self) -> bool:
        if self._lock is None:
            lock = Privacy().appended(self._folder / LOCK_NAME)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    def _maintain(self) -> None:
        if self.process is None:
            if time.monotonic() < self._due_s:
                return
            try:
                self._start()
            except OSError as error:  # no such interpreter, no room for a log, ...
                self._failed(f"it could not be started: {error}")
                return
        process = self.process
        assert process is not None
        ended = process.how_it_ended()
        if ended is not None:
            self._failed(f"it ended ({ended})")
        else:
            self._check(process)

    def _start(self) -> None:
        self._ready_s = None
        self.process = ScorerProcess(self._settings, self._folder, self._environment, self._module)
        self._report("starting", f"the scorer process {self.process.pid} loads its models")

    def _check(self, process: ScorerProcess | None) -> None:
        """Ask the scorer; kill it if it does not answer and it is this server's."""
        try:
            answer = ping(self._folder, self._settings.hung_after_s, self._closed)
        except (OSError, WireError) as error:
            self._unanswered(process, str(error))
            return
        if answer is not None:
            self._ready_s = self._ready_s or time.monotonic()
            refused = "; ".join(f"probe {name!r} is refused: {why}" for name, why in answer.refused.items())
            self._report("ready", refused or "the scorer answers", tuple(answer.probes or ()))
        elif not self._closed.is_set():
            self._unanswered(process, f"it did not answer for {self._settings.hung_after_s:g} s")

    def _unanswered(self, process: ScorerProcess | None, why: str) -> None:
        if process is None:
            self._report("down", f"the scorer of another server of this state folder does not answer ({why})")
        elif process.how_it_ended() is not None:
            self._failed(f"it ended ({process.how_it_ended()})")
        elif self._ready_s is not None:
            self._failed(f"it hangs: {why}")
        elif time.monotonic() - process.began_s > self._settings.load_s:
            self._failed(f"it was not ready within {self._settings.load_s:g} s")

    def _failed(self, why: str) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None
            self._restarts += 1
        if self._ready_s is not None and time.monotonic() - self._ready_s >= LONGEST_WAIT_S:
            self._failures = 0  # it worked for long enough
        self._failures += 1
        wait_s = min(FIRST_WAIT_S * 2 ** min(self._failures - 1, 16), LONGEST_WAIT_S)
        self._due_s = time.monotonic() + wait_s
        self._report("down", f"{why}; see {LOG_NAME}. The next start, after {self._failures} failure(s), is in "
                     f"{wait_s:g} s")  # fmt: skip
        log.warning("the scorer is down: %s", self._health.detail)

    def _report(self, status: ScorerStatus, detail: str, probes: tuple[str, ...] = ()) -> None:
        self._health = ScorerHealth(status, detail, probes, 0, self._restarts)
