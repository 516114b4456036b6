"""A supervisor that suspends itself at one point; it reads its config from stdin.

    python -m tests.support.pausing_supervisor POINT MARK

The first time that it reaches POINT it writes the file MARK and stops itself (SIGSTOP), like a machine that is
suspended. The process that started it lets it continue (SIGCONT).
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.control.supervisor.supervisor import Supervisor, supervise
from llama_stack_provider_moe.spec.server_config import ProviderConfig

# point -> the method, and whether to stop before or after it; in the order of a job's life
POINTS: dict[str, tuple[type, str, str]] = {
    "claimed": (Supervisor, "_launch", "before"),
    "at the gate": (JobStore, "launched", "before"),
    "launched": (JobStore, "launched", "after"),
    "ended": (Supervisor, "_end", "before"),  # `poll` has just returned how it ended
    "outcome known": (Supervisor, "_outcome", "after"),
    "folder looked at": (disk.Unfinished, "__init__", "after"),
    "settling": (Supervisor, "_settle", "before"),
    "in the transaction": (disk.Unfinished, "set_aside", "after"),
    "settled": (disk.Unfinished, "delete", "before"),
}


def pausing(real: Callable[..., Any], when: str, mark: Path) -> Callable[..., Any]:
    """`real` with a stop before or after its first call."""

    def pause() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    def call(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            pause()
            return real(*arguments, **named)
        found = real(*arguments, **named)
        pause()
        return found

    return call


if __name__ == "__main__":
    owner, name, when = POINTS[sys.argv[1]]
    setattr(owner, name, pausing(getattr(owner, name), when, Path(sys.argv[2])))
    sys.exit(supervise(ProviderConfig.model_validate_json(sys.stdin.buffer.read())))
