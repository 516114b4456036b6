"""Trials of kernels with faults, `faulty_trial`, as forks of a process that has imported torch and Triton before.

Such an import takes longer than a trial. `python -m tests.support.warm_trials SOCKET` imports and waits. A command
`command(socket, fault)` is a process as any other: what it starts has its pipes, and it ends as the fork ends, by a
signal too. If it is killed, so is the fork.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.jobs_support import wait_for

CLIENT = """
import os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as to:
    to.connect(sys.argv[1])
    socket.send_fds(to, [sys.argv[2].encode()], [0, 1, 2])
    for fd in (0, 1, 2):
        os.close(fd)
    code = int(to.recv(16))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (9, 19) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def command(address: Path, fault: str) -> tuple[str, ...]:
    """Starts a trial with this fault."""
    return (sys.executable, "-S", "-E", "-c", CLIENT, str(address), fault)


@contextmanager
def warm(address: Path) -> Iterator[None]:
    """The process that forks, until the block ends; Triton is interpreted in it."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.Popen([sys.executable, "-m", __name__, str(address)], env=environment)
    try:
        wait_for(lambda: address.exists() or process.poll() is not None)
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def _fork(fault: str, pipes: list[int]) -> int:
    from tests.support import faulty_trial

    if pid := os.fork():
        return pid
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    code = 1
    try:
        faulty_trial.main(fault)
        code = 0
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end(pid: int, client: socket.socket) -> int:
    """Exit code of a fork, negative for a signal; it is killed if the client goes."""
    fork = os.pidfd_open(pid)
    ready, _, _ = select.select([fork, client], [], [])
    if fork not in ready:
        os.kill(pid, signal.SIGKILL)
    os.close(fork)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(address: str) -> None:
    from tests.support import faulty_trial  # noqa: F401  the imports that take long

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        os.rename(f"{address}.new", address)
        while True:
            client, _ = listening.accept()
            with client:
                said, pipes, _, _ = socket.recv_fds(client, 1024, 3)
                pid = _fork(said.decode(), list(pipes))
                for pipe in pipes:
                    os.close(pipe)
                with suppress(BrokenPipeError):
                    client.sendall(str(_end(pid, client)).encode())


if __name__ == "__main__":
    main(sys.argv[1])
