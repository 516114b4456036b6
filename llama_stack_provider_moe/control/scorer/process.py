"""One scorer process, from its start to its end, and the check that it answers."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scorer_wire import (
    LENGTH_BYTES,
    Answer,
    Request,
    Start,
    WireError,
    frame,
    length_of,
    read_as,
    socket_in,
)

MODULE = "llama_stack_provider_moe.compute.probing.scorer"
LOG_NAME = "scorer.log"
_STEP_S = 0.2  # a waiting check looks this often whether the server closes
_ENDING_S = 10.0


class ScorerProcess:
    """A scorer process. It ends with this process at the latest, because its standard input then ends.

    Args:
        settings: its probes, interpreter and limits.
        folder: for its socket and its log; only this user may enter it.
        environment: of the process.
        module: to run; tests use others.

    Raises:
        OSError: it can't be started.
    """

    def __init__(
        self, settings: ScorerSettings, folder: Path, environment: Mapping[str, str], module: str = MODULE
    ) -> None:
        path = folder / LOG_NAME
        if path.exists():  # the log of the one before may say why it ended
            path.replace(path.with_name(f"{LOG_NAME}.1"))
        with Privacy().appended(path) as output:
            self._process = subprocess.Popen(
                [settings.python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self.began_s = time.monotonic()
        start = Start(folder=str(folder), settings=settings)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; `how_it_ended` says how
            self._process.stdin.write(start.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def how_it_ended(self) -> str | None:
        """Exit code or signal; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def kill(self) -> None:
        """End it at once, with every process that it started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it waits for a disk or a device, and ends when that answers
            self._process.wait(_ENDING_S)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


def ping(folder: Path, limit_s: float, closed: threading.Event) -> Answer | None:
    """What the scorer says of itself; None if there is no answer within `limit_s`, or `closed` is set.

    Args:
        folder: of its socket.
        limit_s: longest wait, in seconds.
        closed: set when the caller no longer wants to know.

    Raises:
        OSError: nobody listens, or whoever did has ended.
        WireError: it answers something else.
    """
    deadline_s = time.monotonic() + limit_s
    with socket_in(folder) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(_STEP_S)
        while True:
            try:
                line.connect(path)
                break
            except (TimeoutError, BlockingIOError):  # its queue of connections is full
                if time.monotonic() > deadline_s or closed.wait(_STEP_S):
                    return None
        line.sendall(frame(Request(ping=True)))
        content, wanted = b"", LENGTH_BYTES
        while len(content) < wanted:
            try:
                piece = line.recv(wanted - len(content))
            except TimeoutError:
                if time.monotonic() > deadline_s or closed.is_set():
                    return None
                continue
            if not piece:
                raise ConnectionResetError("it closed the connection")
            content += piece
            if len(content) == LENGTH_BYTES == wanted:
                wanted += length_of(content)
        answer = read_as(Answer, content[LENGTH_BYTES:])
        if answer.probes is None:
            raise WireError("the answer to a check names no probes")
        return answer
