"""`Nursery`: a process that has the training libraries imported, and forks training processes that need not.

Importing torch, transformers and TRL takes tens of seconds of processor time; a fork takes none of it. The other side
is `training.nursery`, which never touches CUDA, so that each child may. The two share a socket pair whose messages are
JSON objects:

    nursery: {"ready": true}                         once everything is imported
    we:      {"folder": ..., "environment": {...}}   with two descriptors: the output file, the gate's reading end
    nursery: {"pid": ...}                            the child exists, and waits at the gate
    nursery: {"ended": pid, "code": ...}             at each child's end, before its pid can be anybody else's

The gate is a pipe: a child runs once a line comes through it, and ends where none can come any more. When we die the
nursery ends and its children go on; when it dies its children go on too, and how they ended is then unknown.
"""

import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.config import ProviderConfig

MESSAGE_BYTES = 1 << 18
IMPORT_LIMIT_S = 900.0  # of a slow disk; after that it is taken for hanging
ANSWER_LIMIT_S = 30.0  # a fork takes milliseconds
LOG_NAME = "nursery.log"

log = logging.getLogger("llama_stack_provider_moe.supervisor")


class Warmth(StrEnum):
    """Whether a child can be forked."""

    IMPORTING = "importing"
    READY = "ready"
    GONE = "gone"


class Born(NamedTuple):
    """A child at the gate; `gate` is a descriptor to write the line to, or to close."""

    pid: int
    gate: int


class Nursery:
    """One nursery process, from its start to its end.

    Args:
        config: whose interpreter it runs in and whose state folder keeps its log.
        environment: that it imports in; children get their own.
        module: what to run; tests run one that imports nothing.
    """

    def __init__(
        self,
        config: ProviderConfig,
        environment: Mapping[str, str],
        module: str = "llama_stack_provider_moe.training.nursery",
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._began_s = time.monotonic()
        self._warmth = Warmth.IMPORTING
        self._ends: dict[int, int] = {}
        with theirs, (config.state_dir / LOG_NAME).open("wb") as output:
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

    def warmth(self) -> Warmth:
        """How it is now."""
        while self._warmth is not Warmth.GONE and self._receive() is not None:
            pass
        if self._warmth is Warmth.IMPORTING and time.monotonic() - self._began_s > IMPORT_LIMIT_S:
            self.close(f"it did not get ready within {IMPORT_LIMIT_S:g} s")
        return self._warmth

    def fork(self, folder: Path, environment: Mapping[str, str], output: int) -> Born:
        """A child for the job in `folder`; it waits at the gate.

        Args:
            folder: of the job; the child's working directory.
            environment: all of the child's.
            output: descriptor of its standard output and error.

        Raises:
            OSError: the nursery is gone, or could not fork.
        """
        reading, gate = os.pipe()
        try:
            request = json.dumps({"folder": str(folder), "environment": dict(environment)}).encode()
            socket.send_fds(self._socket, [request], [output, reading])
            return Born(self._answer(), gate)
        except BaseException:
            os.close(gate)
            raise
        finally:
            os.close(reading)

    def _answer(self) -> int:
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while self._warmth is not Warmth.GONE and time.monotonic() < deadline:
            message = self._receive()
            if message is None:
                time.sleep(0.005)
            elif "pid" in message:
                return int(message["pid"])
            elif "error" in message:
                raise OSError(f"the nursery could not fork: {message['error']}")
        self.close(f"it did not answer within {ANSWER_LIMIT_S:g} s")
        raise ChildProcessError("the nursery is gone")

    def end_of(self, pid: int) -> int | None:
        """Exit code of a child (-N: signal N), None where it has not ended or nobody knows."""
        self.warmth()
        return self._ends.pop(pid, None)

    def close(self, why: str | None = None) -> None:
        """End it; its children go on."""
        if self._warmth is Warmth.GONE:
            return
        self._warmth = Warmth.GONE
        self._socket.close()
        if why is not None:
            log.warning("the nursery of training processes is given up: %s; see %s", why, LOG_NAME)
            self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any] | None:
        """The next message, None where there is none; ends and readiness are noted."""
        try:
            content = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            self.close(str(error))
            return None
        if not content:
            self.close(f"it ended (exit code {self._process.poll()})")
            return None
        message: dict[str, Any] = json.loads(content)
        if "ready" in message:
            self._warmth = Warmth.READY
            log.info("the nursery is ready after %.0f s", time.monotonic() - self._began_s)
        if "ended" in message:
            self._ends[int(message["ended"])] = int(message["code"])
        return message
