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
        """True where no further move exists."""
        return not MOVES[self]


MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.IN_PROGRESS, JobState.CANCELLED, JobState.FAILED}),
    JobState.IN_PROGRESS: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


def check_move(job_id: str, old: JobState, new: JobState) -> None:
    """Raise `Conflict` unless `old` to `new` is a legal move."""
    if new not in MOVES[old]:
        raise Conflict(f"job {job_id!r} is {old.value}; it can't become {new.value}")
