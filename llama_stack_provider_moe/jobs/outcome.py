"""How a job's process ended, and what becomes of the job; told from what the process left behind."""

import signal
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.jobs import disk
from llama_stack_provider_moe.jobs.events import latest
from llama_stack_provider_moe.jobs.executors import Exit
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder, Manifest
from llama_stack_provider_moe.jobs.output import printable, tail
from llama_stack_provider_moe.jobs.scan import saved_artifacts
from llama_stack_provider_moe.jobs.state import JobState
from llama_stack_provider_moe.jobs.store import Job

REASON_LIMIT = 2000  # characters
_OUTPUT_LIMIT_BYTES = 1000
_OUT_OF_MEMORY = (
    "the training process was killed by the kernel: out of memory (the machine's, not a GPU's); a smaller "
    "`training.batch_size` or `options.max_length`, a LoRA instead of all weights, fewer jobs at a time "
    "(`supervisor.max_concurrent_jobs`) or more memory will help"
)


class Outcome(NamedTuple):
    """What the store is told: an end for `JobStore.move`, or `scheduled` for `JobStore.requeue`."""

    state: JobState
    reason: str | None
    artifacts: tuple[Artifact, ...]
    stopped_by: str | None = None


def outcome(job: Job, end: Exit, max_attempts: int, given_up: str | None = None) -> Outcome:
    """What becomes of a job whose training process is gone.

    Completed: it left a manifest, and no exit code that says otherwise; a signal that reached it after that spoils
    nothing. Else cancelled, if that was asked for. Else failed, if we gave it up, it gave a reason itself, ended with
    an exit code of its own, ran out of memory, or left a full disk: it would do the same again. Else it was lost, and
    is tried again unless that has happened `max_attempts` times. Checkpoints that were finished are its artifacts in
    any case.

    Args:
        job: as it is in the store.
        end: how its process ended.
        max_attempts: see `SupervisorConfig`.
        given_up: why the supervisor stopped it, where it did.
    """
    folder = JobFolder(Path(job.folder))
    damage: str | None = None
    try:
        manifest = _manifest(job, folder)
    except (OSError, ValueError) as error:
        manifest, damage = None, f"the training process left a manifest that can't be read: {error}"
    if manifest is not None and (end.code is None or end.code <= 0):
        return Outcome(JobState.COMPLETED, None, tuple(manifest.artifacts), manifest.stopped_by)
    saved = saved_artifacts(folder)
    if job.cancel_requested_at is not None:
        return Outcome(JobState.CANCELLED, _where_cancelled(folder), saved)
    newest = latest(folder.events)
    reason = given_up or damage or (newest["failed"].reason if "failed" in newest else None)
    state = JobState.FAILED
    no_room = disk.full_for(folder)
    if reason is None:
        what = _death(end, asked_to_stop="cancelled" in newest)
        # Asked to stop, but not by us: whoever shuts the machine down.
        if no_room is None and not end.out_of_memory and (end.code is None or end.code < 0 or "cancelled" in newest):
            again = job.lost + 1 < max_attempts
            what += f" ({job.lost + 1} of at most {max_attempts} starts lost{'; it is tried again' if again else ''})"
            state = JobState.SCHEDULED if again else JobState.FAILED
        last = tail(folder.output, _OUTPUT_LIMIT_BYTES).strip()
        reason = f"{what}; last output: {last}" if last else f"{what}; it printed nothing"
    if no_room is not None and "the disk is full" not in reason:
        reason = f"{no_room}; what was saved before is whole: free some and resume it; {reason}"
    return Outcome(state, printable(reason)[:REASON_LIMIT], saved)


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


def _death(end: Exit, asked_to_stop: bool) -> str:
    if end.out_of_memory:
        return _OUT_OF_MEMORY
    if asked_to_stop:
        return "the training process was asked to stop by a signal that did not come from here, and saved a checkpoint"
    if end.said is not None:
        return end.said
    if end.code is None:
        return "the training process ended while no supervisor watched it"
    if end.code == 0:
        return "the training process ended without a manifest, though with exit code 0"
    if end.code > 0:
        return f"the training process ended with exit code {end.code}"
    return f"the training process was killed by {signal.Signals(-end.code).name}"
