"""`experts.json` in a job's folder: the code that computes the experts from now on, in place of the job's own setting.

The training process writes it when a kernel fails in the middle of training, and ends with `HANDED_OVER`; the
supervisor then starts the job again, from its last checkpoint. The server writes it when a resumption asks for another
backend, while the job has no process. The job's `spec.json` stays as it was submitted.
"""

from pathlib import Path

from pydantic import Field

from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import Block
from llama_stack_provider_moe.spec.moe import ExpertsBackend

EXPERTS_FILE = "experts.json"
HANDED_OVER = 5  # exit code
_REASON_LIMIT = 1000  # characters


class ExpertsOverride(Block):
    """What replaces `moe.experts_backend` of the job."""

    experts_backend: ExpertsBackend
    reason: str = Field(max_length=_REASON_LIMIT)


def write_override(folder: JobFolder, backend: ExpertsBackend, reason: str) -> None:
    """Compute the experts with `backend` from the next start on."""
    write_atomic(_file(folder), ExpertsOverride(experts_backend=backend, reason=reason[:_REASON_LIMIT]))


def read_override(folder: JobFolder) -> ExpertsOverride | None:
    """Return what replaces the job's setting; None if nothing does.

    Raises:
        ValidationError: The file is damaged.
    """
    try:
        return read_as(ExpertsOverride, _file(folder).read_bytes())
    except FileNotFoundError:
        return None


def _file(folder: JobFolder) -> Path:
    return folder.root / EXPERTS_FILE
