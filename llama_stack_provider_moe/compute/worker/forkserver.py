"""The forkserver: it imports all libraries once, and training processes are forked from it.

`control.supervisor.executors.forkserver` starts it and asks it for forks.

It runs no thread and never initialises CUDA, because a fork survives neither. It checks this before each fork, and
refuses to fork if it no longer holds.
"""

import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from llama_stack_provider_moe.compute.data.workers import end_helpers
from llama_stack_provider_moe.compute.runtime.threads import fork
from llama_stack_provider_moe.compute.worker import main as entry
from llama_stack_provider_moe.compute.worker.preload import preload
from llama_stack_provider_moe.errors import ForkRefused
from llama_stack_provider_moe.ground.private import take_umask

Run = Callable[[list[str]], int]
MESSAGE_BYTES = 1 << 18
NOT_STARTED = 125  # exit code


class ForkRequest(TypedDict):
    """What the supervisor sends for each fork."""

    folder: str
    environment: dict[str, str]


def run_job(arguments: list[str]) -> int:
    """`main` of a training process whose libraries were imported before its folder was known; its exit code."""
    from datasets import config

    config.HF_DATASETS_CACHE = Path(arguments[0]) / "cache"  # `main` sets the variable, too late for the import
    return entry.main(arguments)


def run_child(request: ForkRequest, output: int, gate: int, run: Run) -> int:
    """Run one job in the forked process, and return its exit code.

    Args:
        request: the job's folder and environment.
        output: file descriptor for stdout and stderr.
        gate: file descriptor that the supervisor writes a line to once the job may start, or closes.
        run: the job, by its folder.
    """
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    line = os.read(gate, 8)
    for descriptor in (nothing, output, gate):
        os.close(descriptor)
    if not line:
        return NOT_STARTED
    os.environ.clear()
    os.environ.update(request["environment"])
    take_umask(os.environ)
    os.chdir(request["folder"])
    return run([request["folder"]])


def serve(connection: socket.socket, run: Run) -> None:
    """Fork a child for each request, and report the end of each, until the other side closes the connection or ends.

    Args:
        connection: to the supervisor.
        run: what each child runs.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A supervisor that was killed may have left a message unread: ECONNRESET or EPIPE, not the end of a file.
    with suppress(ConnectionError), selectors.DefaultSelector() as selector:
        connection.send(json.dumps({"ready": True}).encode())
        selector.register(connection, selectors.EVENT_READ)
        selector.register(reading, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not connection:
                    os.read(reading, 4096)
                elif not _fork(connection, run, (reading, writing)):
                    return
            _report_ends(connection)


def _fork(connection: socket.socket, run: Run, own: tuple[int, int]) -> bool:
    content, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
    if not content:
        return False
    output, gate = descriptors
    try:
        pid = fork()
    except ForkRefused as refused:
        connection.send(json.dumps({"refused": str(refused)}).encode())
    except OSError as error:
        connection.send(json.dumps({"error": str(error)}).encode())
    else:
        if pid == 0:
            _child(json.loads(content), output, gate, run, (connection.detach(), *own))
        connection.send(json.dumps({"pid": pid}).encode())
    for descriptor in descriptors:
        os.close(descriptor)
    return True


def _child(request: ForkRequest, output: int, gate: int, run: Run, ours: tuple[int, ...]) -> None:
    """Run a job in the fork. It never returns, because its caller is the forkserver's loop."""
    code = 1
    try:
        for descriptor in ours:
            os.close(descriptor)
        code = run_child(request, output, gate, run)
    except BaseException:  # noqa: BLE001  no error of a child may reach the forkserver's loop
        with suppress(OSError):  # a full disk
            traceback.print_exc()
    finally:
        entry.flush()
        end_helpers()
        os._exit(code)


def _report_ends(connection: socket.socket) -> None:
    while True:
        try:
            end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if end is None:
            return
        code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        connection.send(json.dumps({"ended": end.si_pid, "code": code}).encode())
        os.waitpid(end.si_pid, 0)


if __name__ == "__main__":
    for name, value in entry.QUIET.items():
        os.environ.setdefault(name, value)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            preload()
        except ForkRefused as refused:
            connection.send(json.dumps({"refused": str(refused)}).encode())
            sys.exit(1)
        serve(connection, run_job)
    os._exit(0)
