"""Run work in two processes forked from this one, which has imported the libraries; with gloo, on the CPU."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=120)


def in_processes(size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """The result of `work(rank)` in each process; a process that fails shows why, and fails the test."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=LIMIT
                )
                torch.save(work(rank), folder / f"{rank}.pt")
                code = 0
            except BaseException:  # noqa: BLE001  it must not get back into pytest's code
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * size, codes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
