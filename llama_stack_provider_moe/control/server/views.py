"""Builds the API's answers from a job's row in the store and the files in its folder; all reads are bounded."""

import json
import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server.event_index import saved_artifacts
from llama_stack_provider_moe.control.server.wire import JobLine, JsonObject, PostTrainingJobLogStream
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.errors import Forbidden
from llama_stack_provider_moe.ground.small_files import open_regular, read_small
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder
from llama_stack_provider_moe.jobdir.output import printable

LOG_WINDOW_BYTES = 1 << 20


def folder_of(job: Job) -> JobFolder:
    """Return the folder of a job, once its files are known to be its own.

    Raises:
        Forbidden: one of them is a link, which may lead to a file of another user.
    """
    folder = JobFolder(Path(job.folder))
    for path in (
        folder.spec, folder.row_reports, folder.resolved, folder.events, folder.output, folder.exports, folder.manifest,
        folder.served, folder.later,
    ):  # fmt: skip
        if path.is_symlink():
            raise Forbidden(f"{path.name} of job {job.id!r} is a link; the server reads only files in the job's folder")
    return folder


def line(job: Job, labels: dict[str, str], waits_for: list[str]) -> JobLine:
    """Return a job with these labels, which waits for these jobs, as an entry of a list."""
    return JobLine(
        job_uuid=job.id,
        status=job.state,
        recipe=job.recipe,
        parent=job.parent,
        model=job.model,
        scheduled_at=job.scheduled_at,
        started_at=job.started_at,
        completed_at=job.ended_at,
        owner=job.owner,
        labels=labels,
        note=job.note,
        sweep=job.sweep,
        pipeline=job.pipeline,
        waits_for=waits_for,
        unreadable=job.unreadable,
    )


def places(job: Job) -> list[Path]:
    """Return the folders with a job's files: its own, and its subfolder of a `checkpoint_dir` elsewhere."""
    folder = JobFolder(Path(job.folder))
    if folder.spec.is_symlink():  # such a job can still be deleted
        return [folder.root]
    try:
        checkpoints = folder.checkpoints(folder.read_spec())
    except (FileNotFoundError, ValidationError):  # a job with a missing or damaged spec can still be deleted
        return [folder.root]
    return [folder.root] if checkpoints.is_relative_to(folder.root) else [folder.root, checkpoints]


def disk_bytes(job: Job) -> int:
    """Return the size of all files of a job, including checkpoints elsewhere; a file with two links counts once."""
    sizes = {}
    for root in places(job):
        if root.is_symlink():  # leads to files of something else
            continue
        for parent, _, names in os.walk(root):
            for name in names:
                with suppress(FileNotFoundError):  # a checkpoint that was just pruned
                    found = os.lstat(os.path.join(parent, name))
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def artifacts(job: Job) -> tuple[Artifact, ...]:
    """Return the artifacts of a job; while it runs, those that it has saved so far."""
    return job.artifacts if job.state.ended else saved_artifacts(folder_of(job).events)


def log(job: Job, tail: int, offset: int | None) -> PostTrainingJobLogStream:
    """Return the last `tail` lines of a job's output, or the lines from byte `offset` on.

    Lines are complete (a line that is still being written appears later, unless the job has ended), and at most
    `LOG_WINDOW_BYTES` in total; of a line that a progress bar overwrote with `\\r`, only the last version.
    """
    try:
        file = open_regular(folder_of(job).output)
    except FileNotFoundError:
        return PostTrainingJobLogStream(job_uuid=job.id, log_lines=[], next_offset=0)
    with file:
        size = file.seek(0, 2)
        start = min(offset, size) if offset is not None else max(0, size - LOG_WINDOW_BYTES)
        file.seek(start)
        data = file.read(LOG_WINDOW_BYTES)
    whole = data.rfind(b"\n") + 1
    is_last = job.state.over and len(data) < LOG_WINDOW_BYTES
    if is_last or (not whole and len(data) == LOG_WINDOW_BYTES):
        whole = len(data)
    lines = [printable(_last_version(text)) for text in data[:whole].decode("utf-8", "replace").split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    if offset is None:
        lines = lines[-tail:]
    return PostTrainingJobLogStream(job_uuid=job.id, log_lines=lines, next_offset=start + whole)


def _last_version(text: str) -> str:
    return text.rstrip("\r").rpartition("\r")[2]


def json_of(path: Path) -> JsonObject | None:
    """Return the JSON object in a job's file; None for a missing file, and `{"unreadable": WHY}` for a damaged one."""
    try:
        content = json.loads(read_small(path, 64 << 20))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return {"unreadable": f"{path.name}: {error}"}
    return content if isinstance(content, dict) else {"unreadable": f"{path.name}: not an object"}
