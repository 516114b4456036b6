"""`Forkserver`: a process that has imported the training libraries, and forks training processes that need no imports.

Importing torch, transformers and TRL takes tens of seconds of processor time; a fork takes almost none. The other side
is `compute.worker.forkserver`. It never touches CUDA, so that each child can use it. The two sides share a socket pair
whose messages are JSON objects:

    forkserver: {"ready": true}                         everything is imported
    supervisor: {"folder": ..., "environment": {...}}   with two descriptors: the output file, the gate's reading end
    forkserver: {"pid": ...}                            the child exists and waits at the gate
    forkserver: {"error": ...}                          the system could not create a process; the next try may succeed
    forkserver: {"refused": ...}                        it runs a thread, so forks are unsafe; the supervisor ends it
    forkserver: {"ended": pid, "code": ...}             a child ended; sent before its pid can be reused

Each side ignores unknown fields and messages, because `training_python` may have another version of this package.

The gate is a pipe. A child begins when it reads a line from the gate, and ends if the gate closes first. If the
supervisor dies, the forkserver ends and its children continue. If the forkserver dies, its children continue too, and
their exit codes are then unknown.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, TypedDict

from llama_stack_provider_moe.spec.server_config import ProviderConfig

MESSAGE_BYTES = 1 << 18
IMPORT_LIMIT_S = 900.0  # enough for a slow disk; after that the forkserver counts as hanging
ANSWER_LIMIT_S = 30.0  # a fork takes milliseconds
LOG_NAME = "forkserver.log"

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class _Message(TypedDict, total=False):
    """A message of the forkserver, see above."""

    ready: bool
    pid: int
    error: str
    refused: str
    ended: int
    code: int


class Readiness(StrEnum):
    """Whether a child can be forked."""

    IMPORTING = "importing"
    READY = "ready"
    GONE = "gone"


class ForkedChild(NamedTuple):
    """A child at the gate. `gate` is the descriptor to write the line to, or to close."""

    pid: int
    gate: int


class Forkserver:
    """One forkserver process, from its start to its end.

    Args:
        config: Configuration with the interpreter to use and the state folder for the log.
        environment: Environment of the forkserver; children get their own.
        module: Module to run; tests use one that imports nothing.
    """

    def __init__(
        self,
        config: ProviderConfig,
        environment: Mapping[str, str],
        module: str = "llama_stack_provider_moe.compute.worker.forkserver",
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._began_s = time.monotonic()
        self._readiness = Readiness.IMPORTING
        self._ends: dict[int, int] = {}
        path = config.state_dir / LOG_NAME
        if path.exists():  # the previous forkserver's log may say why it ended
            path.replace(path.with_name(f"{LOG_NAME}.1"))
        with theirs, path.open("wb") as output:
            self._process = subprocess.Popen(
                [config.training_python, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        self._socket.setblocking(False)

    def readiness(self) -> Readiness:
        """Return the current state."""
        while self._readiness is not Readiness.GONE and self._receive() is not None:
            pass
        if self._readiness is Readiness.IMPORTING and time.monotonic() - self._began_s > IMPORT_LIMIT_S:
            self.close(f"it was not ready within {IMPORT_LIMIT_S:g} s")
        return self._readiness

    def fork(self, folder: Path, environment: Mapping[str, str], output: int) -> ForkedChild:
        """Fork a child for a job. The child waits at the gate.

        Args:
            folder: Folder of the job; the child's working directory.
            environment: The child's whole environment.
            output: Descriptor for its standard output and error.

        Raises:
            OSError: The fork failed, or the forkserver has ended or did not accept the request.
        """
        reading, gate = os.pipe()
        try:
            request = json.dumps({"folder": str(folder), "environment": dict(environment)}).encode()
            socket.send_fds(self._socket, [request], [output, reading])
            return ForkedChild(self._answer(), gate)
        except BaseException:
            os.close(gate)
            raise
        finally:
            os.close(reading)

    def _answer(self) -> int:
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while self._readiness is not Readiness.GONE and time.monotonic() < deadline:
            message = self._receive()
            if message is None:
                time.sleep(0.005)
            elif "pid" in message:
                return int(message["pid"])
            elif "error" in message:
                raise OSError(f"the forkserver could not fork: {message['error']}")
        self.close(f"it did not answer within {ANSWER_LIMIT_S:g} s")
        raise ChildProcessError(f"the forkserver is gone: {self.end_reason}")

    def end_of(self, pid: int) -> int | None:
        """Return a child's exit code (-N: signal N); None if it has not ended or the code is unknown."""
        self.readiness()
        return self._ends.pop(pid, None)

    def close(self, why: str | None = None) -> None:
        """End the forkserver; its children continue.

        Args:
            why: Kept as `end_reason`. If None, the forkserver is not killed; it ends by itself once its socket closes.
        """
        if self._readiness is Readiness.GONE:
            return
        self._readiness = Readiness.GONE
        self._socket.close()
        if why is not None:
            self.end_reason = why
            self._process.kill()
        self._process.wait()

    def _receive(self) -> _Message | None:
        """Return the next message, None if there is none; record readiness and ends of children."""
        try:
            content = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:  # ECONNRESET rather than an end of file: it ended before it read our last request
            self.close(f"it ended ({self._how_it_ended()}; {os.strerror(error.errno or 0)})")
            return None
        if not content:
            self.close(f"it ended ({self._how_it_ended()})")
            return None
        try:
            message: _Message = json.loads(content)
            if "ready" in message:
                self._readiness = Readiness.READY
                log.info("the forkserver is ready after %.0f s", time.monotonic() - self._began_s)
            if "ended" in message:
                self._ends[int(message["ended"])] = int(message["code"])
            if "refused" in message:
                self.close(str(message["refused"]))
        except (ValueError, TypeError, KeyError) as error:
            self.close(f"it sent a message that can't be read ({type(error).__name__}: {error}): {content[:80]!r}")
            return None
        return message

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(ANSWER_LIMIT_S)  # its socket closes before the process has ended
        except subprocess.TimeoutExpired:
            return "it closed its socket but still runs"
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
