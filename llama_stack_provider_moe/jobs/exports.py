"""The steps of an export job: how each stands, and the file that says so; read by all, written by the child.

Each step has a state of its own: one that fails leaves the others alone, and a job that is resumed takes up those that
are not completed.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field, ValidationError

from llama_stack_provider_moe.jobs.folder import JobFolder
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.spec import Block

READ_LIMIT_BYTES = 8 << 20


class StepState(StrEnum):
    """How a step stands."""

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"  # a step that it needs has failed
    CANCELLED = "cancelled"  # the job was, before it was done


class ExportStep(Block):
    """One step of an export job."""

    name: str
    state: StepState = StepState.SCHEDULED
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str | None = Field(default=None, description="Why it failed, or was skipped.")
    note: str | None = Field(default=None, description="For a person, what was done.")
    artifact: str | None = Field(default=None, description="Identifier of what it left.")
    figures: dict[str, Any] | None = Field(default=None, description="What was measured of it.")


class ExportSteps(Block):
    """All steps of an export job, in their order."""

    steps: list[ExportStep]


def read_steps(folder: JobFolder) -> list[ExportStep]:
    """As the training process wrote them; none before it has begun, and none where the file can't be read."""
    try:
        with folder.exports.open("rb") as file:
            return ExportSteps.model_validate_json(file.read(READ_LIMIT_BYTES)).steps
    except (OSError, ValidationError):
        return []


def steps_of(folder: JobFolder, state: JobState, reason: str | None) -> list[ExportStep]:
    """The steps as they stand in a job of this state: a process that was killed could not say so of the step at hand.

    Args:
        folder: of the export job.
        state: of the job.
        reason: why the job ended so.
    """
    return [_seen(step, state, reason) for step in read_steps(folder)]


def _seen(step: ExportStep, state: JobState, reason: str | None) -> ExportStep:
    if step.state not in (StepState.SCHEDULED, StepState.IN_PROGRESS) or state is JobState.IN_PROGRESS:
        return step
    if state is JobState.SCHEDULED:
        return step.model_copy(update={"state": StepState.SCHEDULED, "started_at": None})
    if state is JobState.CANCELLED:
        return step.model_copy(update={"state": StepState.CANCELLED})
    failed = step.state is StepState.IN_PROGRESS
    why = reason if failed else "the job ended before"
    return step.model_copy(update={"state": StepState.FAILED if failed else StepState.SKIPPED, "reason": why})
