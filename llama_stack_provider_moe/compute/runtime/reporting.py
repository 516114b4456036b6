"""Report the signs of life of a training process (see `liveness`), also of its imports. Imports no library."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder

from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.imports import uncollected_imports
from llama_stack_provider_moe.jobdir.events import EventLog, Progress

# For the lines that a process without events writes to the job's output.
LINE_EVERY_S = 30.0


@contextmanager
def reported_to(events: EventLog, leads: bool) -> Iterator[None]:
    """Inside, the process's stages become events of the job.

    Args:
        events: the job's events.
        leads: whether this process writes events. Another process prints a line at most every `LINE_EVERY_S` seconds,
            because rank 0 may wait for it without a sign of life.
    """

    def write(work: liveness.Work) -> None:
        # Ignored here: a full disk fails the write of something that has to be kept.
        with suppress(OSError):
            events.append(Progress(stage=work.stage, done=work.done, total=work.total, unit=work.unit))

    with liveness.reports_to(write) if leads else reported_in_lines():
        yield


@contextmanager
def reported_in_lines() -> Iterator[None]:
    """Inside, the process prints its stages, a line at most every `LINE_EVERY_S` seconds."""
    due_s = time.monotonic() + LINE_EVERY_S

    def show(work: liveness.Work) -> None:
        nonlocal due_s
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + LINE_EVERY_S
            with suppress(OSError):
                print(f"{work.stage}: {work.done:,}{_of(work.total)} {work.unit}", flush=True)

    with liveness.reports_to(show):
        yield


def _of(total: int | None) -> str:
    return "" if total is None else f" of {total:,}"


@contextmanager
def imports_counted() -> Iterator[None]:
    """Inside, each imported module counts: importing the libraries takes minutes on a busy machine."""
    with uncollected_imports(), liveness.stage("importing libraries", unit="modules") as counter:
        finder = _Finder(counter)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Counts imports and finds no module itself."""

    def __init__(self, counter: liveness.Counter) -> None:
        self._counter = counter

    def find_spec(self, *_: object) -> None:
        """Count another module."""
        self._counter.advance()
