"""`Bench`: processes that grade, each with limits of time and memory. One that hangs is killed and replaced.

The limits work in any thread, because nothing here uses a signal handler: the deadline is that of a socket, and a
process that misses it is killed with all that it started.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, cast

from llama_stack_provider_moe.graders.child import MOST_LINE
from llama_stack_provider_moe.graders.samples import TRANSIENT, Failure, FailureCode

MODULE = "llama_stack_provider_moe.graders.child"
START_S = 60.0  # the first task of a process also waits for its imports
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "VIRTUAL_ENV")
_READ_BYTES = 1 << 16
type Task = Mapping[str, object]


class Limits(NamedTuple):
    """What grading may take.

    Attributes:
        deadline_s: seconds for one task.
        memory_mb: memory of a process, in MB.
        processes: number of processes, and of questions to judges at the same time.
        retries: further tries of what may not fail again.
    """

    deadline_s: float = 10.0
    memory_mb: int = 1024
    processes: int = 2
    retries: int = 1


class _Waiting(NamedTuple):
    task: Task
    deadline_s: float
    result: "Future[float | Failure]"


class Bench:
    """A few processes that grade, started when they are needed.

    Args:
        limits: of each task and process.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._tasks: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._changing = threading.Lock()
        self._closed = False

    def run(self, tasks: Sequence[Task], deadline_s: float | None = None) -> list[float | Failure]:
        """Return the value of each task, or why it has none; at most `processes` of them run at a time.

        Args:
            tasks: see `bounded.run`.
            deadline_s: seconds for each; None: that of the limits.
        """
        waiting = [_Waiting(task, deadline_s or self.limits.deadline_s, Future()) for task in tasks]
        with self._changing:
            if self._closed:
                return [Failure("ended", "grading has ended")] * len(tasks)
            for _ in range(min(len(tasks), self.limits.processes - len(self._threads))):
                thread = threading.Thread(target=self._work, name=f"moe-grade-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            for each in waiting:
                self._tasks.put(each)
        return [each.result.result() for each in waiting]

    def close(self) -> None:
        """End the processes; tasks that wait are answered first."""
        with self._changing:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        child: _Child | None = None
        while (waiting := self._tasks.get()) is not None:
            found: float | Failure = Failure("ended", "no process that grades could be started")
            for _ in range(1 + self.limits.retries):
                try:
                    child = child or _Child(self.limits.memory_mb)
                    found = child.run(waiting.task, waiting.deadline_s)
                except OSError as error:
                    found = Failure("ended", f"no process that grades could be started: {error}")
                if child is not None and child.is_lost:
                    child.kill()
                    child = None
                if not isinstance(found, Failure) or found.code not in TRANSIENT:
                    break
            waiting.result.set_result(found)
        if child is not None:
            child.kill()


class _Child:
    """One process that grades.

    Args:
        memory_mb: its memory, in MB.

    Attributes:
        is_lost: whether it can't be used any more.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self, memory_mb: int) -> None:
        self._socket, other = socket.socketpair()
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # Libraries of linear algebra reserve address space for each thread.
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(memory_mb)], stdin=other.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        self._is_new = True
        self.is_lost = False

    def run(self, task: Task, deadline_s: float) -> float | Failure:
        """Return the value of a task, or why there is none."""
        if len(_line(task)) > MOST_LINE:
            return Failure("too_large", f"its texts have more than {MOST_LINE:,} bytes")
        until_s = time.monotonic() + deadline_s + (START_S if self._is_new else 0.0)
        try:
            if self._is_new:  # what its start takes is not the task's
                self._ask({"do": "regex", "with": {"pattern": "", "whole": False, "text": ""}}, until_s)
                self._is_new = False
                until_s = time.monotonic() + deadline_s
            return _read(self._ask(task, until_s))
        except TimeoutError:
            self.is_lost = True
            return Failure("deadline", f"it took longer than {deadline_s:g} s and was stopped")
        except (OSError, EOFError):
            self.is_lost = True
            return Failure("ended", f"its process ended ({self._how()})")

    def kill(self) -> None:
        """End it and what it started."""
        self._socket.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, task: Task, until_s: float) -> bytes:
        self._socket.settimeout(max(0.001, until_s - time.monotonic()))
        self._socket.sendall(_line(task))
        found = bytearray()
        while not found.endswith(b"\n"):
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
            piece = self._socket.recv(_READ_BYTES)
            if not piece or len(found) > MOST_LINE:
                raise EOFError
            found += piece
        return bytes(found)

    def _how(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _line(task: Task) -> bytes:
    return json.dumps(task).encode() + b"\n"


def _read(line: bytes) -> float | Failure:
    answer: dict[str, object] = json.loads(line)
    if "value" in answer:
        return float(cast(float, answer["value"]))
    return Failure(cast(FailureCode, answer["failed"]), str(answer["message"]))
