"""The steps of an export job, and the file with their states. The training process writes it, and all others read it.

Each step has its own state. A failed step does not affect the others, and a resumed job runs the steps that are not
completed.
"""

import json
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.reading import read_each, why_unreadable
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import Block

READ_LIMIT_BYTES = 8 << 20


class StepState(StrEnum):
    """The state of a step."""

    SCHEDULED = "scheduled"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    SKIPPED = "skipped"  # a step that it needs has failed
    CANCELLED = "cancelled"  # the job was cancelled before the step was done
    UNREADABLE = "unreadable"  # never written; stands for states that this version does not know

    @classmethod
    def _missing_(cls, value: object) -> "StepState":
        return cls.UNREADABLE


class ExportStep(Block):
    """One step of an export job."""

    name: str
    state: StepState = StepState.SCHEDULED
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str | None = Field(default=None, description="Why the step failed or was skipped.")
    note: str | None = Field(default=None, description="Summary of what was done, for the user.")
    artifact: str | None = Field(default=None, description="Identifier of the artifact that the step left.")
    figures: dict[str, Any] | None = Field(default=None, description="Figures that were measured.")


class ExportSteps(Block):
    """All steps of an export job, in their order."""

    steps: list[ExportStep]


def read_steps(folder: JobFolder) -> list[ExportStep]:
    """Read the steps; empty before the export has begun. An entry that can't be read becomes a step with the reason."""
    try:
        with folder.exports.open("rb") as file:
            document = json.loads(file.read(READ_LIMIT_BYTES))
        values = document["steps"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [_unreadable(folder, why_unreadable(error))]
    steps, problems = read_each(ExportStep, values)
    return [*steps, *(_unreadable(folder, why) for why in problems)]


def _unreadable(folder: JobFolder, why: str) -> ExportStep:
    return ExportStep(name=folder.exports.name, state=StepState.UNREADABLE, reason=f"it can't be read: {why}")


def steps_of(folder: JobFolder, state: JobState, reason: str | None) -> list[ExportStep]:
    """Return the steps, corrected by the job's state: a killed process could not record the end of its current step.

    Args:
        folder: Folder of the export job.
        state: State of the job.
        reason: Why the job ended.
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
    why = reason if failed else "the job ended before this step"
    return step.model_copy(update={"state": StepState.FAILED if failed else StepState.SKIPPED, "reason": why})
