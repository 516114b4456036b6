"""The states of a job and the legal moves between them, defined only here."""

from enum import StrEnum
from typing import Literal

from llama_stack_provider_moe.errors import Conflict

# What ended a job's training before its last step, other than a request.
StoppedBy = Literal["time_budget", "early_stopping", "no_reward_spread"]


class JobState(StrEnum):
    """The five states of the post-training API (`cancelled` is not a kind of failure), and `unreadable`.

    `unreadable` is never written. It stands for a state that this version does not know, and has no legal moves.
    """

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNREADABLE = "unreadable"

    @classmethod
    def _missing_(cls, value: object) -> "JobState":
        return cls.UNREADABLE

    @property
    def ended(self) -> bool:
        """Whether the job has ended, so that nothing happens unless somebody resumes it."""
        return self in ENDED

    @property
    def over(self) -> bool:
        """Whether a client that follows the job can stop waiting: the job has ended or can't be read."""
        return self.ended or self is JobState.UNREADABLE


ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})
UNFINISHED = frozenset({JobState.SCHEDULED, JobState.IN_PROGRESS})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SCHEDULED: frozenset({JobState.IN_PROGRESS, JobState.CANCELLED, JobState.FAILED}),
    # Back to `scheduled`: the job's process was lost, and the job is tried again.
    JobState.IN_PROGRESS: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.SCHEDULED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.SCHEDULED}),  # resumed
    JobState.CANCELLED: frozenset({JobState.SCHEDULED}),  # resumed
    JobState.UNREADABLE: frozenset(),
}


def check_move(job_id: str, old: JobState, new: JobState) -> None:
    """Raise `Conflict` unless `old` to `new` is a legal move."""
    if new not in MOVES[old]:
        raise Conflict(f"job {job_id!r} is {old.value}; it can't become {new.value}")
