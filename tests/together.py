"""Jobs of several processes, one after the other: `python -m tests.together FOLDER...`.

The libraries are imported once. Each job has its own output file, and a line on standard output with its exit code.
"""

import os
import sys
from pathlib import Path

from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.training import main
from llama_stack_provider_moe.training.warmth import warm_up


def run(folder: str) -> int:
    """The job's exit code, -N where its leader died of signal N."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            output = os.open(JobFolder(Path(folder)).output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for target in (1, 2):
                os.dup2(output, target)
            code = main.main([folder])
        finally:
            main.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    for name, value in main.QUIET.items():
        os.environ.setdefault(name, value)
    warm_up()
    for folder in sys.argv[1:]:
        print(folder, run(folder), flush=True)
