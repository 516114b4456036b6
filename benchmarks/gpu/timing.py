"""Time and memory of one piece of work on a device: events, a flushed cache, and the peak of allocations."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # several times any second-level cache of today
LEAST = 3  # repetitions, however slow
Work = Callable[[], Any]


class DeviceLost(Exception):
    """The device answers no more: nothing that this process measures from here on would mean anything."""


@dataclass(frozen=True)
class Times:
    """Milliseconds, over `repetitions`; of few the outer percentiles are the extremes."""

    median: float
    p10: float
    p90: float
    repetitions: int

    def as_json(self) -> dict[str, float]:
        """For the result file."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Clock:
    """Times work on `device`: by CUDA events on a GPU, by the processor's clock elsewhere."""

    def __init__(self, device: torch.device, repetitions: int, limit_s: float) -> None:
        """`limit_s`: of one measurement; slow work is repeated less often, `LEAST` times at least."""
        self.device, self.repetitions, self.limit_s = device, repetitions, limit_s
        self._cuda = device.type == "cuda"
        room = FLUSH_BYTES
        if self._cuda:
            room = max(room, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._flushed = torch.empty(room if self._cuda else 2**20, dtype=torch.int8, device=device)

    def wait(self) -> None:
        """Until the device has done what it was given; raises what went wrong there."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def first_s(self, work: Work) -> float:
        """Seconds of a first call, with all that is compiled and tuned in it."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def times(self, prepare: Work, work: Work, share: float = 1.0) -> Times:
        """Of `work` alone, which was called before; before each call `prepare`, and the cache is flushed.

        `share`: of the time that a measurement may take.

        Eager launches as in training, no CUDA graph: work that is shorter than its launches shows their time.
        """
        prepare()
        once_s = self.first_s(work)
        count = max(LEAST, min(self.repetitions, int(share * self.limit_s / max(once_s, 1e-6))))
        found = self._by_events(count, prepare, work) if self._cuda else self._by_clock(count, prepare, work)
        tenths = statistics.quantiles(found, n=10, method="inclusive")
        return Times(statistics.median(found), tenths[0], tenths[-1], count)

    def _by_events(self, count: int, prepare: Work, work: Work) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in marks:
            prepare()
            self._flushed.zero_()
            begin.record()
            work()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) for begin, end in marks]

    def _by_clock(self, count: int, prepare: Work, work: Work) -> list[float]:
        found = []
        for _ in range(count):
            prepare()
            self._flushed.zero_()
            began = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - began))
        return found

    def peak_bytes(self, prepare: Work, work: Work) -> int | None:
        """What `work` allocates at most above what was allocated before it; None: not a GPU, nobody counts."""
        if not self._cuda:
            return None
        prepare()
        self.tidy()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def tidy(self) -> None:
        """Give back what nobody holds, where memory is counted.

        Raises:
            DeviceLost: the device has failed.
        """
        if not self._cuda:
            return
        gc.collect()
        try:
            self.wait()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # torch.AcceleratorError among them
            raise DeviceLost(str(error)) from error


def ceilings(clock: Clock, size: int, dtype: torch.dtype) -> dict[str, float]:
    """What the device does at best here: a square dense product in TFLOP/s, a copy in TB/s (read and written)."""
    left, right = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.times(lambda: None, lambda: left @ right)
    source = torch.ones(size * size * 4, device=clock.device, dtype=dtype)
    target = torch.empty_like(source)
    copied = clock.times(lambda: None, lambda: target.copy_(source))
    return {
        f"dense_{size}_tflops": round(2 * size**3 / product.median / 1e9, 2),
        "copy_tb_s": round(2 * source.nbytes / copied.median / 1e9, 4),
    }
