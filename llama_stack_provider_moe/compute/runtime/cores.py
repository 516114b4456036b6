"""How many CPU cores this process may use."""

import os
import sys
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """Cores that this process may use, by its affinity and its control group's CPU limit (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = _LIMIT.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def cores_of_leader(local_size: int) -> int:
    """Cores that rank 0 may use while the other processes of its machine wait for it.

    Args:
        local_size: the job's processes on this machine; each may use OMP_NUM_THREADS cores, where that is set.
    """
    each = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(each) * local_size) if each.isdecimal() and int(each) > 0 else cores()
