"""How a job's process ended and which state the job gets, derived from the files that the process left."""

import signal
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.control.store import disk
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.control.supervisor.executors import Exit
from llama_stack_provider_moe.jobdir.attempt import ATTEMPT_FILE, SUPERSEDED, read_attempt
from llama_stack_provider_moe.jobdir.events import Started, Step, latest
from llama_stack_provider_moe.jobdir.experts_backend import HANDED_OVER, read_override
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder, Manifest
from llama_stack_provider_moe.jobdir.output import printable, tail
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.jobdir.state import JobState

REASON_LIMIT = 2000  # characters
_OUTPUT_LIMIT_BYTES = 4000
_OUTPUT_LINES = 3
_LINE_LIMIT = 500  # characters
# Python's messages about semaphores of killed processes. They appear after the end and do not explain it.
_NOISE = ("resource_tracker:", "resource_tracker.py:")
_OUT_OF_MEMORY = (
    "the training process was killed by the kernel: out of memory (the machine's, not a GPU's); to avoid it, use a "
    "smaller `training.batch_size` or `options.max_length`, a LoRA instead of all weights, fewer jobs at a time "
    "(`supervisor.max_concurrent_jobs`) or more memory"
)


class Outcome(NamedTuple):
    """What to record in the store: an end state for `JobStore.move`, or `scheduled` for `JobStore.requeue`."""

    state: JobState
    reason: str | None
    artifacts: tuple[Artifact, ...]
    stopped_by: str | None = None
    lost: bool = False  # its process was lost, whether or not the job is tried again


def outcome(job: Job, end: Exit, max_attempts: int, given_up: str | None = None) -> Outcome:
    """Decide what happens to a job whose training process has ended.

    - Completed: it left a manifest and no positive exit code. A signal that reached it after the manifest is harmless.
    - Otherwise cancelled, if that was requested.
    - Otherwise scheduled again, if one of its kernels failed and another is to take over (`jobdir.experts_backend`).
    - Otherwise failed, if the supervisor stopped it, it reported a reason, it ended with a positive exit code, it ran
      out of memory, or the disk is full. It would fail the same way again.
    - Otherwise it was lost. It is tried again unless that has happened `max_attempts` times.

    Finished checkpoints become artifacts in every case.

    Args:
        job: The job as it is in the store.
        end: How its process ended.
        max_attempts: See `SupervisorConfig`.
        given_up: Why the supervisor stopped it, if it did.
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
        return Outcome(JobState.CANCELLED, _where_cancelled(job.recipe, folder, saved), saved)
    newest = latest(folder.events)
    reason = given_up or damage or (newest["failed"].reason if "failed" in newest else None)
    state, lost = JobState.FAILED, False
    no_room = disk.full_for(folder)
    if reason is None and no_room is None and end.code == HANDED_OVER:
        # Not a lost start: the next one runs other kernels, so this happens once.
        return Outcome(JobState.SCHEDULED, _handed_over(folder), saved)
    if reason is None:
        what = _how_it_ended(end, _where_it_stopped(folder, saved) if "cancelled" in newest else None)
        # A `cancelled` event without a request: someone else sent the signal, for example a shutdown of the machine.
        if no_room is None and not end.out_of_memory and (end.code is None or end.code < 0 or "cancelled" in newest):
            again = job.lost + 1 < max_attempts
            what += f" ({job.lost + 1} of at most {max_attempts} starts lost{'; it is tried again' if again else ''})"
            state, lost = (JobState.SCHEDULED if again else JobState.FAILED), True
        output = _last_lines(folder)
        reason = f"{what}; last output: {output}" if output else f"{what}; it printed nothing"
        if end.code == SUPERSEDED and (why := _superseded(job, folder)) is not None:
            reason = why
    if no_room is not None and "the disk is full" not in reason:
        reason = f"{no_room}; {_disk_full_advice(saved)}; {reason}"
    elif reason.startswith("the disk is full"):  # reported by the process itself
        reason = f"{reason}; {_disk_full_advice(saved)}"
    return Outcome(state, printable(reason)[:REASON_LIMIT], saved, lost=lost)


def _handed_over(folder: JobFolder) -> str:
    override = read_override(folder)
    why = "a kernel failed" if override is None else override.reason
    return printable(f"{why}; the next start computes the experts with torch")[:REASON_LIMIT]


def _last_lines(folder: JobFolder) -> str:
    """Return the last lines of the output that may say why the process ended."""
    lines = [line.rstrip() for line in tail(folder.output, _OUTPUT_LIMIT_BYTES).splitlines()]
    useful = [line for line in lines if line.strip() and not any(noise in line for noise in _NOISE)]
    return "\n".join(line[-_LINE_LIMIT:] for line in useful[-_OUTPUT_LINES:]).strip()


def _superseded(job: Job, folder: JobFolder) -> str | None:
    """Return why a process ended itself as superseded; None if the folder says that it is the current attempt."""
    try:
        counts = read_attempt(folder.root)
    except (OSError, ValueError) as error:
        return f"the training process ended itself: {ATTEMPT_FILE} in its folder can't be read ({error})"
    if counts is None:
        return (
            f"the training process ended itself, because its folder was replaced, emptied or deleted while it ran: "
            f"there is no {ATTEMPT_FILE} in {folder.root}"
        )
    if counts.name != job.attempt:
        return (
            f"the training process ended itself, because another attempt replaced it: {ATTEMPT_FILE} in {folder.root} "
            f"names attempt {counts.number}"
        )
    return None


def _manifest(job: Job, folder: JobFolder) -> Manifest | None:
    manifest = folder.read_manifest()
    if manifest is not None and manifest.job_uuid != job.id:
        raise ValueError(f"it is of job {manifest.job_uuid!r}")
    return manifest


def _where_cancelled(recipe: str, folder: JobFolder, saved: tuple[Artifact, ...]) -> str:
    """Say where a job was when it stopped and from what it can resume."""
    if recipe == "export":
        return "cancelled during the export; a resumed export keeps the completed steps"
    if recipe == "playground":
        return "cancelled; its answers stay, and a resumed playground answers the prompts that still wait"
    if recipe == "routing_analysis":
        return "cancelled before the report was written; a resumed analysis starts from the beginning"
    if recipe == "ablation_measure":
        return "cancelled before the measurements were written; a resumed job measures from the beginning"
    if recipe == "probe":
        return "cancelled before the probe was written; a resumed job fits it from the beginning"
    if recipe == "mix":
        return "cancelled before the mixed model was complete; a resumed job mixes from the beginning"
    if recipe == "ablation":
        return "cancelled before the edited model or its adapter was complete; a resumed job edits from the beginning"
    if recipe == "surgery":
        return "cancelled before the new model was complete; a resumed job starts from the beginning"
    return f"cancelled {_where_it_stopped(folder, saved)}"


def _where_it_stopped(folder: JobFolder, saved: tuple[Artifact, ...]) -> str:
    """Say where the latest attempt of a training job stopped, such as `at step 4, after saving a checkpoint`."""
    newest = latest(folder.events)
    step = newest["cancelled"].step if "cancelled" in newest else 0
    if not step and "step" in newest and _is_of_this_attempt(newest["step"], newest.get("started")):
        step = newest["step"].step
    kept = max((each.step for each in saved if each.kind == "checkpoint"), default=None)
    if step and kept == step:
        return f"at step {step}, after saving a checkpoint"
    if kept is not None:
        where = f"at step {step}" if step else "before the first step since it was resumed"
        return f"{where}; its last checkpoint is from step {kept}"
    where = f"at step {step}" if step else "before the first step"
    return f"{where}; it saved no checkpoint, so it starts from the beginning when it is resumed"


def _disk_full_advice(saved: tuple[Artifact, ...]) -> str:
    """Say what to do about a full disk."""
    if saved:
        return "everything saved before is intact: free some space and resume the job"
    return "nothing was saved: free some space and resume the job, which starts from the beginning"


def _is_of_this_attempt(event: Step, started: Started | None) -> bool:
    """Whether a step is of the current attempt; the steps of earlier attempts may have been undone."""
    return started is None or event.time >= started.time


def _how_it_ended(end: Exit, stopped: str | None) -> str:
    if end.out_of_memory:
        return _OUT_OF_MEMORY
    if stopped is not None:
        return f"the training process was stopped by a signal that this server did not send: it ended {stopped}"
    if end.message is not None:
        return end.message
    if end.code is None:
        return "the training process ended while no supervisor watched it"
    if end.code == 0:
        return "the training process ended with exit code 0 but without a manifest"
    if end.code > 0:
        return f"the training process ended with exit code {end.code}"
    return f"the training process was killed by {signal.Signals(-end.code).name}"
