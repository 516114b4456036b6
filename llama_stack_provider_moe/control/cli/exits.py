"""Exit codes of `moe-train`."""

from enum import IntEnum
from http import HTTPStatus

from llama_stack_provider_moe.errors import MoeError, ServerLost, ServerRefused
from llama_stack_provider_moe.jobdir.state import JobState


class Exit(IntEnum):
    """Exit codes; shells use 130 for SIGINT and 141 for SIGPIPE."""

    OK = 0  # the command succeeded; the job completed or is still running
    FAILED = 1  # the job failed
    REFUSED = 2  # the command line is wrong, the server refused, or it can't read the job
    CANCELLED = 3  # the job was cancelled
    LOST = 4  # no server answered, or the server had an internal error
    INTERRUPTED = 130
    PIPE_CLOSED = 141


OUTCOMES: dict[JobState, Exit] = {
    JobState.SCHEDULED: Exit.OK,
    JobState.IN_PROGRESS: Exit.OK,
    JobState.COMPLETED: Exit.OK,
    JobState.FAILED: Exit.FAILED,
    JobState.CANCELLED: Exit.CANCELLED,
    JobState.UNREADABLE: Exit.REFUSED,
}


def exit_of(error: MoeError) -> Exit:
    """Return the exit code of a command that ended with `error`."""
    if isinstance(error, ServerLost):
        return Exit.LOST
    broke_down = (
        isinstance(error, ServerRefused)
        and error.answered >= HTTPStatus.INTERNAL_SERVER_ERROR
        and error.answered != HTTPStatus.NOT_IMPLEMENTED  # "not implemented" is an answer
    )
    return Exit.LOST if broke_down else Exit.REFUSED
