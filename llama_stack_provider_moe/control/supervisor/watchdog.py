"""Time measured by a clock that nobody can set: how long a job has been silent, and whether the wall clock was set."""

import time
from dataclasses import dataclass

from llama_stack_provider_moe.jobdir.folder import JobFolder

# A longer time between two checks is not counted in full: the supervisor itself was stopped (a paused container, a
# store that did not answer), and most likely the job with it.
_LONGEST_LOOK_S = 120.0


@dataclass
class _Sign:
    sizes: tuple[int, ...]
    looked_at: float
    silent_s: float


class Watchdog:
    """Measures how long jobs are silent: no new byte in their events or their output.

    It uses a clock that nobody sets and that stops while the machine is suspended. Nothing is kept on disk, so a new
    supervisor starts from 0.
    """

    def __init__(self) -> None:
        self._signs: dict[str, _Sign] = {}

    def silent_s(self, job_id: str, folder: JobFolder) -> float:
        """Return the seconds since the first check of this job, or since its files last grew."""
        moment = time.monotonic()
        sizes = tuple(path.stat().st_size if path.exists() else 0 for path in (folder.events, folder.output))
        sign = self._signs.get(job_id)
        if sign is None or sign.sizes != sizes:
            self._signs[job_id] = _Sign(sizes, moment, 0.0)
            return 0.0
        sign.silent_s += min(moment - sign.looked_at, _LONGEST_LOOK_S)
        sign.looked_at = moment
        return sign.silent_s

    def forget(self, job_id: str) -> None:
        """Forget the job after its process ended; the next process starts from 0."""
        self._signs.pop(job_id, None)


class WallClock:
    """Notices when somebody sets the wall clock, by which the ages of jobs are computed."""

    def __init__(self) -> None:
        self._offset_s = self._offset()

    def moved_s(self) -> float:
        """Return by how many seconds the clock was set forward (negative: back) since this object was created."""
        return self._offset() - self._offset_s

    @staticmethod
    def _offset() -> float:
        # CLOCK_BOOTTIME continues while the machine is suspended, as the wall clock does. It exists only on Linux.
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
