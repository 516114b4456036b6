"""The states of a job and the legal moves between them; nothing else in the package knows them."""

from enum import StrEnum

from llama_stack_provider_moe.errors import Conflict


class JobState(StrEnum):
    """The five states of the post-training API; `cancelled` is not a kind of failure."""

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True where nothing happens any more unless somebody resumes the job."""
        return self in ENDED


ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.IN_PROGRESS, JobState.CANCELLED, JobState.FAILED}),
    # Back to `scheduled`: its process was lost, and it is tried again.
    JobState.IN_PROGRESS: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.SCHEDULED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.SCHEDULED}),  # resumed
    JobState.CANCELLED: frozenset({JobState.SCHEDULED}),  # resumed
}


def check_move(job_id: str, old: JobState, new: JobState) -> None:
    """Raise `Conflict` unless `old` to `new` is a legal move."""
    if new not in MOVES[old]:
        raise Conflict(f"job {job_id!r} is {old.value}; it can't become {new.value}")
