"""Identify processes on Linux: a pid may be reused, but a pid together with its time of birth is unique.

This reads /proc with the standard library only, because psutil is not a dependency of the server. Like training, it
works only on Linux.
"""

import os
import socket
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def birth(pid: int) -> float | None:
    """Return the seconds from the machine's boot to the start of process `pid`; None if no such process is alive.

    This is field 22 of /proc/PID/stat (proc_pid_stat(5)). It does not change during the process's life, not even by
    `exec`. It counts from boot and not from 1970, which would change when somebody sets the clock. A zombie has ended
    and is not alive: if pid 1 reaps nothing, as in many containers, zombies stay for ever.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19]) / _TICKS_PER_S


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2 is the program's name in parentheses, which may itself contain spaces and parentheses.
    return stat[stat.rindex(")") + 2 :].split()


def is_alive(pid: int, pid_birth: float) -> bool:
    """Return whether the process that started at `pid_birth` is still alive."""
    return birth(pid) == pid_birth


def is_reaped(pid: int, pid_birth: float) -> bool:
    """Return whether not even a zombie of that process is left."""
    fields = _stat(pid)
    return fields is None or int(fields[19]) / _TICKS_PER_S != pid_birth


def in_session(leader: int) -> list[int]:
    """Return the pids in the session of an ended process `leader`; none if its pid is in use again.

    The kernel does not reuse the number of a session that still has members (pid_namespaces(7), setsid(2)).
    """
    if _stat(leader) is not None:
        return []
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return [pid for pid in pids if (fields := _stat(pid)) is not None and int(fields[3]) == leader]


def with_environment(name: str, value: str, other: str | None = None, expected: str = "") -> list[int]:
    """Return the pids of this user's processes that were started with `name=value` in their environment.

    Args:
        name: Name of the variable.
        value: Value of the variable.
        other: Name of a second variable; leave out processes in which it has another value than `expected`.
        expected: Value of the second variable.
    """
    entry = f"{name}={value}".encode()
    foreign = None if other is None else f"{other}=".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # the process ended meanwhile, or belongs to another user
                continue
            entries = environment.split(b"\0")
            if entry in entries and not any(
                foreign is not None and each.startswith(foreign) and each[len(foreign) :] != expected.encode()
                for each in entries
            ):
                found.append(int(folder.name))
    return found


class PidScope(NamedTuple):
    """Where a pid is valid: one boot of one machine, and one pid namespace (container)."""

    host: str
    boot: str
    namespace: str

    @classmethod
    def here(cls) -> "PidScope":
        """Return the scope of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"))


class ProcessName(NamedTuple):
    """A name that identifies one process among all machines that share a store; used as a supervisor's id."""

    place: PidScope
    pid: int
    pid_birth: float

    @classmethod
    def current(cls) -> "ProcessName":
        """Return the name of this process."""
        pid = os.getpid()
        born = birth(pid)
        assert born is not None, "this process is alive"
        return cls(PidScope.here(), pid, born)

    @classmethod
    def parse(cls, text: str) -> "ProcessName | None":
        """Parse the result of `str`; None if `text` is not such a name."""
        try:
            host, boot, namespace, pid, pid_birth = text.rsplit("/", 4)
            return cls(PidScope(host, boot, namespace), int(pid), float(pid_birth))
        except ValueError:
            return None

    def __str__(self) -> str:
        return "/".join([*self.place, str(self.pid), str(self.pid_birth)])

    def has_ended(self) -> bool:
        """Return True if this process is known to have ended; False for processes of other machines.

        The same host name with another boot or namespace means this machine before it was restarted.
        """
        here = PidScope.here()
        if self.place.host != here.host:
            return False
        return self.place != here or not is_alive(self.pid, self.pid_birth)
