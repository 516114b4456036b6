"""TCP ports for servers that tests start: nothing else on this machine gets them before the server does.

The system gives ports above `ip_local_port_range` to connections and to whoever binds port 0, so a port found that way
may be taken again while a server still imports its libraries. Those below are left alone, and processes that run tests
at the same time claim theirs with a socket in Linux's abstract namespace, which ends with the process.
"""

import os
import socket
from contextlib import suppress

LOWEST, BEYOND = 10_000, 32_000  # below the lowest port that Linux assigns by itself, 32768
_claims: dict[int, socket.socket] = {}


def free_port() -> int:
    """A TCP port that is free, and that no other test gets while this process lives."""
    count = BEYOND - LOWEST
    for offset in range(count):
        # From the process id on: processes that start together look at different ports.
        port = LOWEST + (os.getpid() * 40 + len(_claims) + offset) % count
        if port not in _claims and _is_free(port) and (claim := _claimed(port)):
            _claims[port] = claim
            return port
    raise AssertionError("no ports are free")


def free_ports(count: int) -> list[int]:
    """So many free ports, all different."""
    return [free_port() for _ in range(count)]


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("", port)):
        return True
    return False


def _claimed(port: int) -> socket.socket | None:
    """A socket that marks the port as taken; None if another process has marked it."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0moe-test-port-{port}")
    except OSError:
        claim.close()
        return None
    return claim
