"""How a training process starts helper processes: those that prepare batches, and those of a library's pool.

By default Python would fork them from the training process, which has threads by then (autograd's, OpenMP's, ...). A
fork copies the locks that these threads hold, so a helper could wait forever for one.
"""

import multiprocessing

PRELOAD = "llama_stack_provider_moe.compute.data.worker_preload"


def fork_from_a_server() -> None:
    """Fork helpers from a process with one thread, Python's forkserver, which starts with the first helper."""
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload([PRELOAD])


def end_helpers() -> None:
    """Kill the helper processes of this process, which is about to end by `os._exit`.

    Nothing else would: torch's workers watch their parent, which is Python's forkserver, and the forkserver stays as
    long as one of them holds its pipe. A supervisor kills what a job leaves, but not every job has one.
    """
    for process in multiprocessing.active_children():
        process.kill()
