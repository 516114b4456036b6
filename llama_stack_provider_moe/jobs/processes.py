"""Which process is which, on Linux: a pid is reused, a pid with its time of birth is not.

Read from /proc with the standard library alone: psutil is no dependency of the server. Linux only, as training is.
"""

import os
import socket
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def birth(pid: int) -> float | None:
    """Seconds from the machine's boot to the start of process `pid`, or None where no such process lives.

    Field 22 of /proc/PID/stat (proc_pid_stat(5)), the same over the process's whole life, `exec` included. Counted
    from boot, not from 1970: that figure moves when somebody sets the clock. A zombie has ended, and counts as gone:
    where pid 1 reaps nothing, as in many containers, it stays for ever.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19]) / _TICKS_PER_S


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2 is the program's name in parentheses, and may hold spaces and parentheses itself.
    return stat[stat.rindex(")") + 2 :].split()


def is_alive(pid: int, pid_birth: float) -> bool:
    """True while the very process that was born at `pid_birth` lives."""
    return birth(pid) == pid_birth


def is_reaped(pid: int, pid_birth: float) -> bool:
    """True once not even a zombie is left of that process."""
    fields = _stat(pid)
    return fields is None or int(fields[19]) / _TICKS_PER_S != pid_birth


def in_session(leader: int) -> list[int]:
    """Pids of the session that process `leader` led, which has ended; none where its pid is in use again.

    The kernel gives no process the number of a session that still has members (pid_namespaces(7), setsid(2)).
    """
    if _stat(leader) is not None:
        return []
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return [pid for pid in pids if (fields := _stat(pid)) is not None and int(fields[3]) == leader]


def with_environment(name: str, value: str) -> list[int]:
    """Pids of this user's processes that were started with `name=value` in their environment."""
    entry = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # ended meanwhile, or another user's
                continue
            if entry in environment.split(b"\0"):
                found.append(int(folder.name))
    return found


class Place(NamedTuple):
    """Where pids mean something: one boot of one machine, one pid namespace (container)."""

    host: str
    boot: str
    namespace: str

    @classmethod
    def here(cls) -> "Place":
        """This process's."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"))


class ProcessName(NamedTuple):
    """The name of one process among all machines that share a store; a supervisor's id."""

    place: Place
    pid: int
    pid_birth: float

    @classmethod
    def own(cls) -> "ProcessName":
        """This process's."""
        pid = os.getpid()
        born = birth(pid)
        assert born is not None, "the process that asks is alive"
        return cls(Place.here(), pid, born)

    @classmethod
    def parse(cls, text: str) -> "ProcessName | None":
        """The inverse of `str`; None for a text that is no such name."""
        try:
            host, boot, namespace, pid, pid_birth = text.rsplit("/", 4)
            return cls(Place(host, boot, namespace), int(pid), float(pid_birth))
        except ValueError:
            return None

    def __str__(self) -> str:
        return "/".join([*self.place, str(self.pid), str(self.pid_birth)])

    def has_ended(self) -> bool:
        """True where this process is known to have ended; of another machine's, nothing is known.

        A host of our name, but of another boot or namespace, is this one before it was restarted.
        """
        here = Place.here()
        if self.place.host != here.host:
            return False
        return self.place != here or not is_alive(self.pid, self.pid_birth)
