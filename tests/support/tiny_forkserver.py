"""A forkserver with tiny children: the real one's loop without the imports."""

import os
import socket
import sys
import time
from pathlib import Path

from llama_stack_provider_moe.compute.worker.forkserver import serve
from tests.support import tiny_child

WAITS_FOR = "TINY_FORKSERVER_WAITS_FOR"  # a file to wait for before it is ready, like imports that take long
DOES = "TINY_FORKSERVER_DOES"  # how it fails


def go_wrong(what: str, door: socket.socket) -> None:
    """Fail as the test asks for, before the loop."""
    if what == "exit":
        sys.exit(7)
    if what == "thread":
        import pyarrow  # noqa: F401  whose jemalloc starts a thread that Python knows nothing of
    if what == "news":
        door.send(b'{"news": "of a later version", "ready": true, "more": [1]}')
    if what == "damage":
        door.send(b"\xff no message")


if __name__ == "__main__":
    while WAITS_FOR in os.environ and not Path(os.environ[WAITS_FOR]).exists():
        time.sleep(0.01)
    with socket.socket(fileno=int(sys.argv[1])) as door:
        go_wrong(os.environ.get(DOES, ""), door)
        serve(door, lambda arguments: tiny_child.main(Path(arguments[0])))
    os._exit(0)
