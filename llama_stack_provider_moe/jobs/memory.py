"""Whether the kernel has just killed a process for want of memory: to its parent, that is a SIGKILL like any other."""

import time
from pathlib import Path

# A large process takes long to die, and the kill is counted when it begins.
_RECENT_S = 60.0


class MemoryKills:
    """Follows the kernel's count of such kills: of a process's control group, or else of the whole machine.

    Neither names the process, so a kill counts for one only if it was seen shortly before that one was gone.

    Args:
        pid: a process that still lives, or the whole machine's count is followed.
        system: where /proc and /sys are found.
    """

    def __init__(self, pid: int, system: Path = Path("/")) -> None:
        self._path = _group_events(pid, system) or system / "proc/vmstat"
        self._count = self._read()
        self._rose_at: float | None = None

    def recently(self) -> bool:
        """True where the count was seen to rise within the last minute; to be asked often."""
        count, moment = self._read(), time.monotonic()
        if count > self._count:
            self._rose_at = moment
        self._count = count
        return self._rose_at is not None and moment - self._rose_at < _RECENT_S

    def _read(self) -> int:
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except OSError:  # another system than Linux 4.13 or newer, or a group that is gone
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _group_events(pid: int, system: Path) -> Path | None:
    """`memory.events` of the process's group (Documentation/admin-guide/cgroup-v2.rst), where it has one."""
    try:
        groups = (system / f"proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in groups:
        if line.startswith("0::/"):
            events = system / "sys/fs/cgroup" / line.removeprefix("0::/") / "memory.events"
            return events if events.exists() else None
    return None
