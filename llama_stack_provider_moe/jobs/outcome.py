"""How a job ended, told from what its training process left behind."""

import signal
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.jobs.events import latest
from llama_stack_provider_moe.jobs.executors import Exit
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder, Manifest
from llama_stack_provider_moe.jobs.output import printable, tail
from llama_stack_provider_moe.jobs.scan import saved_artifacts
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job

REASON_LIMIT = 2000  # characters
_OUTPUT_LIMIT_BYTES = 1000
_CANCEL_SIGNALS = (-signal.SIGTERM, -signal.SIGKILL)


class Outcome(NamedTuple):
    """What `JobStore.move` is told."""

    state: JobState
    reason: str | None
    artifacts: tuple[Artifact, ...]


def outcome(job: Job, end: Exit) -> Outcome:
    """The end of a job whose training process is gone.

    Completed: it left a manifest, and exit code 0 where that is known; the signal of a cancel that reached it between
    the two spoils nothing. Else cancelled, if that was asked for; else
    failed, with the reason the process gave, or what can be told of its death. Checkpoints that were finished before
    are its artifacts in any case.
    """
    folder = JobFolder(Path(job.folder))
    damage: str | None = None
    try:
        manifest = _manifest(job, folder)
    except (OSError, ValueError) as error:
        manifest, damage = None, f"the training process left a manifest that can't be read: {error}"
    well_ended = end.code in (0, None) or (job.cancel_requested_at is not None and end.code in _CANCEL_SIGNALS)
    if manifest is not None and well_ended:
        return Outcome(JobState.COMPLETED, None, tuple(manifest.artifacts))
    saved = saved_artifacts(folder)
    if job.cancel_requested_at is not None:
        return Outcome(JobState.CANCELLED, _where_cancelled(folder), saved)
    reason = damage or _reason_given(folder) or _death(folder, end)
    return Outcome(JobState.FAILED, printable(reason)[:REASON_LIMIT], saved)


def _manifest(job: Job, folder: JobFolder) -> Manifest | None:
    manifest = folder.read_manifest()
    if manifest is not None and manifest.job_uuid != job.id:
        raise ValueError(f"it is of job {manifest.job_uuid!r}")
    return manifest


def _where_cancelled(folder: JobFolder) -> str:
    newest = latest(folder.events)
    if "cancelled" in newest:
        return f"cancelled at step {newest['cancelled'].step}, after saving a checkpoint"
    if "step" in newest:
        return f"cancelled at step {newest['step'].step}"
    return "cancelled before the first step"


def _reason_given(folder: JobFolder) -> str | None:
    failed = latest(folder.events).get("failed")
    return None if failed is None else failed.reason


def _death(folder: JobFolder, end: Exit) -> str:
    if end.code is None:
        text = "the training process ended while no supervisor watched it"
    elif end.code == 0:
        text = "the training process ended without a manifest, though with exit code 0"
    elif end.code > 0:
        text = f"the training process ended with exit code {end.code}"
    elif -end.code == signal.SIGKILL:
        text = "the training process was killed by SIGKILL (out of memory?)"
    else:
        text = f"the training process was killed by {signal.Signals(-end.code).name}"
    last = tail(folder.output, _OUTPUT_LIMIT_BYTES).strip()
    return f"{text}; last output: {last}" if last else f"{text}; it printed nothing"
