"""The threads of this process, including native ones. A fork copies no thread, but it copies the locks that they hold.

`threading` knows only the threads that Python started. Libraries start more (an allocator's background thread, a BLAS
pool, OpenMP workers). After a fork at the wrong moment the child waits forever for a lock that such a thread held.
Linux lists all threads in /proc/self/task.
"""

import os
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

from llama_stack_provider_moe.errors import ForkRefused
from llama_stack_provider_moe.ground.counting import number_of

_TASKS = Path("/proc/self/task")
# Settings that keep imports from starting threads. numpy's OpenBLAS starts a pool when it is loaded (torch uses
# OpenMP's pool, which starts with the first parallel region); pyarrow's jemalloc starts a thread that returns memory.
_OPENBLAS = {"OPENBLAS_NUM_THREADS": "1"}
_ARROW = "JE_ARROW_MALLOC_CONF"
_ENDING_S = 1.0  # Linux still lists a joined thread until the kernel has removed it


def forbid_threads(environment: MutableMapping[str, str]) -> None:
    """Set the variables that keep libraries from starting threads at their import; call this before the imports."""
    environment.update(_OPENBLAS)
    others = [part for part in environment.get(_ARROW, "").split(",") if part and not part.startswith("background_thr")]
    environment[_ARROW] = ",".join([*others, "background_thread:false"])


def other_threads() -> list[str]:
    """The sorted names of this process's other threads: Python's name, or else the kernel's."""
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    mine = threading.get_native_id()
    names = []
    for task in _TASKS.iterdir():
        number = int(task.name)
        if number != mine:
            try:
                names.append(python.get(number) or (task / "comm").read_text(errors="replace").strip())
            except (FileNotFoundError, ProcessLookupError):  # it has ended in the meantime
                continue
    return sorted(names)


def check_alone() -> None:
    """Check that the calling thread is the only one of this process.

    Raises:
        ForkRefused: there are other threads; it names them.
    """
    until = time.monotonic() + _ENDING_S
    while (others := other_threads()) and time.monotonic() < until:
        time.sleep(0.01)
    if others:
        raise ForkRefused(
            f"this process can't be forked: it runs {number_of(len(others), 'more thread')} ({', '.join(others[:8])}), "
            "and a child could wait forever for a lock that one of them holds"
        )


def fork() -> int:
    """Call `os.fork` in a process that has one thread.

    Raises:
        ForkRefused: the process has more threads; nothing was forked.
        OSError: the system can't start another process.
    """
    check_alone()
    return os.fork()
