"""Time that nobody can set: how long a job has given no sign of life, and whether the wall clock was set."""

import time
from dataclasses import dataclass

from llama_stack_provider_moe.jobs.folder import JobFolder

# More between two looks is not counted: the watcher was stopped itself (a paused container, a store that did not
# answer), and the job most likely with it.
_LONGEST_LOOK_S = 120.0


@dataclass
class _Sign:
    sizes: tuple[int, ...]
    looked_at: float
    silent_s: float


class Watchdog:
    """Silences of jobs: not a byte more in their events or their output.

    By the clock that nobody sets, and that stands still while the machine is suspended. Nothing is kept on disk: a
    supervisor that takes over begins to count anew.
    """

    def __init__(self) -> None:
        self._signs: dict[str, _Sign] = {}

    def silent_s(self, job_id: str, folder: JobFolder) -> float:
        """Seconds since the first look at this job, or since its files grew for the last time."""
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
        """The job's process is gone; the next one has all the time again."""
        self._signs.pop(job_id, None)


class WallClock:
    """Notices when somebody sets the clock that ages of jobs are told by."""

    def __init__(self) -> None:
        self._offset_s = self._offset()

    def moved_s(self) -> float:
        """Seconds by which it was set forward (or back, below 0) since this object was made."""
        return self._offset() - self._offset_s

    @staticmethod
    def _offset() -> float:
        # Goes on while the machine is suspended, as the wall clock does; Linux, as all of this room.
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
