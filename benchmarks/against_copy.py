"""Time of a job on a checkpoint's files against that of a plain copy of them, and the memory that it needs.

Both are timed until the data is on disk (fsync), in turns, and the medians are compared: on a shared machine one run
tells little. Every run of the job is a fresh process.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FULL, OUT, COPY = "full", "out", "copy"  # below a benchmark's folder


def peak_bytes() -> int:
    """The most memory that this process has had resident since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    """Reset the peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of `work`, with its time and memory. A tiny run before it takes imports and first calls off."""
    forget_peak()
    before = peak_bytes()
    began, cpu_began = time.monotonic(), time.process_time()
    figures = work()
    return {
        **figures,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "peak_bytes_above_start": peak_bytes() - before,
        "resident_bytes_at_start": before,
    }


def in_another_process(module: str, words: Sequence[str]) -> dict[str, Any]:
    """The document that `python -m MODULE WORDS` prints last."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def copy(folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of the processor, that a plain copy of the weights takes, to the disk."""
    out = folder / COPY
    out.mkdir()
    began, cpu_began = time.monotonic(), time.process_time()
    for file in sorted((folder / FULL).glob("*.safetensors")):
        shutil.copyfile(file, out / file.name)
        handle = os.open(out / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    found = time.monotonic() - began, time.process_time() - cpu_began
    shutil.rmtree(out)
    return found


def compared(name: str, folder: Path, total: int, rounds: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Copy and run in turns.

    Args:
        name: of the job, for the names of its figures.
        folder: has the checkpoint in FULL; `run` writes to OUT.
        total: bytes of the checkpoint.
        rounds: number of runs; one copy more is made.
        run: returns what `timed` does.
    """
    os.sync()  # else the first to write waits for the checkpoint's own bytes
    copies, runs = [copy(folder)], list[dict[str, Any]]()
    for _ in range(rounds):
        runs.append(run())
        shutil.rmtree(folder / OUT)
        copies.append(copy(folder))
    seconds, cpu = median(each["seconds"] for each in runs), median(each["cpu_seconds"] for each in runs)
    copy_seconds, copy_cpu = (median(each[at] for each in copies) for at in (0, 1))
    figures = {key: value for key, value in runs[-1].items() if key not in ("seconds", "cpu_seconds")}
    return {
        **figures,
        f"{name}_seconds": round(seconds, 2),
        f"{name}_seconds_of_each": [round(each["seconds"], 2) for each in runs],
        f"{name}_cpu_seconds": round(cpu, 2),
        "peak_bytes_above_start": max(each["peak_bytes_above_start"] for each in runs),
        f"{name}_mb_per_second": round(total / 1e6 / seconds, 1),
        "copy_seconds": [round(each, 2) for each, _ in copies],
        "copy_cpu_seconds": round(copy_cpu, 2),
        "copy_mb_per_second": round(total / 1e6 / copy_seconds, 1),
        "share_of_copy_speed": round(copy_seconds / seconds, 3),
    }
