"""Limits per owner on this server: checks before a submission, and what `GET quota` answers.

The store decides about jobs and GPU-hours, in its transactions (`store.limits`). Bytes are those of the files in the
state folder. Each submission measures them while it holds the lock of `intake.committing`, with its own rows included,
so two at a time can't both get the last bytes. Folders of jobs that have ended are measured once.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from llama_stack_provider_moe.control.server import views
from llama_stack_provider_moe.control.server.wire_quota import CountedShare, HoursShare, ListQuotasResponse, Quota
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import OverLimit
from llama_stack_provider_moe.spec.server_config import ProviderConfig

EVERY_JOB = 10**9


class Quotas:
    """The limits of one service. Its methods block: call them in a thread.

    Args:
        config: the server's configuration.
        store: returns the store, once it is open.
    """

    def __init__(self, config: ProviderConfig, store: Callable[[], JobStore]) -> None:
        self._config = config
        self._limits = config.limits
        self._store = store
        self._measured: dict[str, tuple[datetime | None, int]] = {}  # job -> its end, and the bytes of its folder

    def must_have_left(self, owner: str, jobs: int = 1) -> None:
        """Raise `OverLimit` if the owner is at a limit, before the rows of jobs or of a data set are read."""
        self._store().must_have_left(owner, self._limits, jobs)
        self.must_have_bytes(owner)

    def must_have_bytes(self, owner: str, *staged: Path) -> None:
        """Raise `OverLimit` if the owner's files reach the limit.

        Args:
            owner: the owner.
            staged: the folders of jobs that are about to become the owner's. A file that two of them share counts
                twice, because it counts for each job once they have been accepted.
        """
        most = self._limits.stored_bytes
        if most is None:
            return
        stored = self.stored_bytes(owner)
        more = sum(tree_bytes([each]) for each in staged)
        if stored + more > most or (not staged and stored >= most):
            what = "this job need" if len(staged) == 1 else "these jobs need"
            wanted = f", and the rows of {what} {more:,} more" if more else ""
            raise OverLimit(
                f"your jobs and data sets take {stored:,} of the {most:,} bytes that this server allows "
                f"(`limits.stored_bytes`){wanted}, so {max(0, most - stored):,} are left; delete jobs or data sets "
                "(moe-train rm JOB, moe-train data rm NAME)",
                None,
            )

    def stored_bytes(self, owner: str) -> int:
        """Return the size of an owner's jobs and data sets in the state folder."""
        store = self._store()
        return store.datasets.used_bytes(owner) + sum(map(self._bytes_of, store.list(owner, EVERY_JOB)))

    def left_for_datasets(self, owner: str) -> int | None:
        """Return how many bytes the owner's data sets may take in all; None: `limits` has no limit."""
        most = self._limits.stored_bytes
        if most is None:
            return None
        return max(0, most - self.stored_bytes(owner) + self._store().datasets.used_bytes(owner))

    def of(self, owner: str) -> Quota:
        """Return what an owner uses and may use."""
        use, limits = self._store().use_of(owner), self._limits
        hours = limits.gpu_hours_per_day
        return Quota(
            owner=owner,
            waiting_jobs=_share(use.waiting, limits.waiting_jobs),
            running_jobs=_share(use.running, limits.running_jobs),
            gpu_hours=HoursShare(
                used=round(use.gpu_hours, 4),
                limit=hours,
                left=None if hours is None else round(max(0.0, hours - use.gpu_hours), 4),
                free_at=None if hours is None else use.gpus_free_at(hours),
            ),
            stored_bytes=_share(self.stored_bytes(owner), limits.stored_bytes),
        )

    def all(self) -> ListQuotasResponse:
        """Return what every owner uses and may use."""
        return ListQuotasResponse(data=[self.of(owner) for owner in sorted(self._store().owners())])

    def _bytes_of(self, job: Job) -> int:
        known = self._measured.get(job.id)
        if known is not None and job.state.ended and known[0] == job.ended_at:
            return known[1]
        state_dir = self._config.state_dir
        found = tree_bytes([place for place in views.places(job) if place.is_relative_to(state_dir)])
        if job.state.ended:
            self._measured[job.id] = (job.ended_at, found)
        return found


def tree_bytes(roots: list[Path]) -> int:
    """Return the size of all files in folders; a file with two links counts once, and links are not followed."""
    sizes = {}
    for root in roots:
        if root.is_symlink():  # leads to files of something else
            continue
        for parent, _, names in os.walk(root):
            for name in names:
                with suppress(FileNotFoundError):  # a checkpoint that was just pruned
                    found = os.lstat(os.path.join(parent, name))
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _share(used: int, limit: int | None) -> CountedShare:
    return CountedShare(used=used, limit=limit, left=None if limit is None else max(0, limit - used))
