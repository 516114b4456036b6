"""What `moe-train` ends with."""

from enum import IntEnum
from http import HTTPStatus

from llama_stack_provider_moe.errors import MoeError, ServerLost, ServerRefused
from llama_stack_provider_moe.jobs.state import JobState


class Exit(IntEnum):
    """Exit codes; 130 and 141 are the shell's own for SIGINT and SIGPIPE."""

    OK = 0  # the job completed, or runs on; or the command did what was asked
    FAILED = 1  # the job failed
    REFUSED = 2  # a mistake in the command line, or the server's refusal
    CANCELLED = 3  # the job was cancelled
    LOST = 4  # no server, it stopped answering, or it broke down over the request
    INTERRUPTED = 130
    PIPE_CLOSED = 141


OUTCOMES: dict[JobState, Exit] = {
    JobState.SCHEDULED: Exit.OK,
    JobState.IN_PROGRESS: Exit.OK,
    JobState.COMPLETED: Exit.OK,
    JobState.FAILED: Exit.FAILED,
    JobState.CANCELLED: Exit.CANCELLED,
}


def exit_of(error: MoeError) -> Exit:
    """The exit code of a command that ended in `error`."""
    if isinstance(error, ServerLost):
        return Exit.LOST
    broke_down = (
        isinstance(error, ServerRefused)
        and error.answered >= HTTPStatus.INTERNAL_SERVER_ERROR
        and error.answered != HTTPStatus.NOT_IMPLEMENTED  # "not offered" is an answer
    )
    return Exit.LOST if broke_down else Exit.REFUSED
