"""How long the parts of a demo take: by the clock, and in processors' time."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class CpuTime:
    """The processor time of this process and of all below it, sampled while the block runs."""

    def __init__(self) -> None:
        self._by_process: dict[tuple[int, float], float] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        """User and system time so far."""
        return sum(self._by_process.values())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._left.wait(0.5):
            for process in [me, *me.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    self._by_process[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:  # it has ended
                    continue


class Parts:
    """The parts of a demo.

    Attributes:
        cpu: processor time, sampled by whoever enters it.
        seconds: by part, seconds by the clock and of processors' time.
    """

    def __init__(self, cpu: CpuTime) -> None:
        self.cpu = cpu
        self.seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        wall, cpu = time.monotonic(), self.cpu.seconds
        yield
        self.seconds[name] = {
            "wall_s": round(time.monotonic() - wall, 1),
            "cpu_s": round(self.cpu.seconds - cpu, 1),
        }
