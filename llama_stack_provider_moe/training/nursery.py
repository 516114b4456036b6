"""The process that training processes are forked from, with everything imported; see `jobs.executors.nursery`.

It runs no thread and never initialises CUDA, neither of which a fork survives (`warmth`).
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
from typing import Any

from llama_stack_provider_moe.training import main as entry
from llama_stack_provider_moe.training.warmth import warm_up

Run = Callable[[list[str]], int]
MESSAGE_BYTES = 1 << 18
NEVER_BEGAN = 125


def run_job(arguments: list[str]) -> int:
    """`main` of a training process whose libraries were imported before its folder was known."""
    from datasets import config

    config.HF_DATASETS_CACHE = Path(arguments[0]) / "cache"  # `main` says so in the environment, read at the import
    return entry.main(arguments)


def become_child(request: dict[str, Any], output: int, gate: int, run: Run) -> int:
    """In the fork: be the training process of one job; its exit code."""
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
        return NEVER_BEGAN
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    return run([request["folder"]])


def serve(connection: socket.socket, run: Run) -> None:
    """Fork a child for each request, to `run`, and tell of each one's end, until the other side closes."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connection.send(json.dumps({"ready": True}).encode())
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(reading, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is connection:
                    if not _fork(connection, run, (reading, writing)):
                        return
                else:
                    os.read(reading, 4096)
            _tell_ends(connection)


def _fork(connection: socket.socket, run: Run, own: tuple[int, int]) -> bool:
    content, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
    if not content:
        return False
    output, gate = descriptors
    try:
        pid = os.fork()
    except OSError as error:
        connection.send(json.dumps({"error": str(error)}).encode())
    else:
        if pid == 0:
            _child(json.loads(content), output, gate, run, (connection.detach(), *own))
        connection.send(json.dumps({"pid": pid}).encode())
    for descriptor in descriptors:
        os.close(descriptor)
    return True


def _child(request: dict[str, Any], output: int, gate: int, run: Run, ours: tuple[int, ...]) -> None:
    """Never returns: above stands the nursery's loop."""
    code = 1
    try:
        for descriptor in ours:
            os.close(descriptor)
        code = become_child(request, output, gate, run)
    except BaseException:  # noqa: BLE001  the entry: whatever it is, it must not get into the nursery's loop
        with suppress(OSError):  # a full disk
            traceback.print_exc()
    finally:
        entry.flush()
        os._exit(code)


def _tell_ends(connection: socket.socket) -> None:
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
    warm_up()
    with socket.socket(fileno=int(sys.argv[1])) as door:
        serve(door, run_job)
    os._exit(0)
