"""What GPUs and processes of this machine use now, from the driver's program and from /proc; no package is needed."""

import os
import shutil
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_QUERY = "index,uuid,name,utilization.gpu,memory.used,memory.total"
_LIMIT_S = 10
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_S = 0.25
# Fields of /proc/PID/stat (proc_pid_stat(5)), counted from the third.
_SESSION, _UTIME, _STIME, _RSS = 3, 11, 12, 21


class GpuUse(NamedTuple):
    """A GPU as the driver describes it; None for what it does not say, as for parts of a GPU (MIG)."""

    number: str
    uuid: str
    name: str
    use: float | None  # share of the last moment in which it computed, 0 to 1
    memory_bytes: int | None
    total_bytes: int | None


class SessionUse(NamedTuple):
    """What the processes of a session use."""

    processes: int
    cpu: float  # cores
    memory_bytes: int  # each process's share of memory that several share


def gpus(path: str | None = None) -> list[GpuUse]:
    """Return the machine's GPUs; none if the driver's program is missing or does not answer.

    Args:
        path: Folders to look for the program in; by default PATH.
    """
    program = shutil.which("nvidia-smi", path=path)
    if program is None:
        return []
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [_gpu(row) for row in rows if len(row) == len(_QUERY.split(","))]


def _gpu(row: list[str]) -> GpuUse:
    index, uuid, name, use, used_mib, total_mib = row
    percent, used, total = map(_number, (use, used_mib, total_mib))
    return GpuUse(
        index,
        uuid,
        name,
        None if percent is None else percent / 100,
        None if used is None else int(used) << 20,
        None if total is None else int(total) << 20,
    )


def _number(text: str) -> float | None:
    with suppress(ValueError):  # "[N/A]"
        return float(text)
    return None


def sessions(leaders: Collection[int]) -> dict[int, SessionUse]:
    """Return what the processes of some sessions use, by the pid of the session's leader. Takes a quarter second."""
    if not leaders:
        return {}
    first, began = _ticks(leaders), time.monotonic()
    time.sleep(_SAMPLE_S)
    second, took_s = _ticks(leaders), time.monotonic() - began
    found = {}
    for leader, members in second.items():
        before = first.get(leader, {})
        ticks = sum(count - before.get(pid, count) for pid, count in members.items())
        memory = sum(_memory_bytes(pid) for pid in members)
        found[leader] = SessionUse(len(members), ticks / _TICKS_PER_S / took_s, memory)
    return found


def _ticks(leaders: Collection[int]) -> dict[int, dict[int, int]]:
    """Return the processor time of each process, by session and pid."""
    found: dict[int, dict[int, int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            fields = _stat(folder)
            if fields is not None and int(fields[_SESSION]) in leaders and fields[0] not in ("Z", "X"):
                session = found.setdefault(int(fields[_SESSION]), {})
                session[int(folder.name)] = int(fields[_UTIME]) + int(fields[_STIME])
    return found


def _stat(folder: Path) -> list[str] | None:
    try:
        stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return None
    return stat[stat.rindex(")") + 2 :].split()


def _memory_bytes(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    fields = _stat(Path(f"/proc/{pid}"))
    return 0 if fields is None else int(fields[_RSS]) * _PAGE_BYTES
