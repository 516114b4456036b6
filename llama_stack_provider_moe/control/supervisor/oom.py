"""Detect that the kernel killed a process because memory ran out. To its parent it looks like any other SIGKILL."""

import time
from pathlib import Path

# A large process takes long to die, and the kernel counts the kill when it begins.
_RECENT_S = 60.0


class MemoryKills:
    """Watch the kernel's count of such kills, for a process's control group or else for the whole machine.

    Neither count names the process. So a kill is attributed to a process only if the count rose shortly before that
    process ended.

    Args:
        pid: A live process. If it has no control group of its own, the machine's count is used.
        system: Folder that contains `proc` and `sys`.
    """

    def __init__(self, pid: int, system: Path = Path("/")) -> None:
        self._path = _group_events(pid, system) or system / "proc/vmstat"
        self._count = self._read()
        self._rose_at: float | None = None

    def recently(self) -> bool:
        """Return whether the count rose within the last minute. Call it often."""
        count, moment = self._read(), time.monotonic()
        if count > self._count:
            self._rose_at = moment
        self._count = count
        return self._rose_at is not None and moment - self._rose_at < _RECENT_S

    def _read(self) -> int:
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except OSError:  # not Linux 4.13 or newer, or the group no longer exists
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _group_events(pid: int, system: Path) -> Path | None:
    """Return `memory.events` of the process's group (Documentation/admin-guide/cgroup-v2.rst), if it has one."""
    try:
        groups = (system / f"proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in groups:
        if line.startswith("0::/"):
            events = system / "sys/fs/cgroup" / line.removeprefix("0::/") / "memory.events"
            return events if events.exists() else None
    return None
