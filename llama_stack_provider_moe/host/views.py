"""A job in the store and the files of its folder -> the API's answers. Reads only; every read is bounded."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llama_stack_provider_moe.errors import Forbidden
from llama_stack_provider_moe.host.wire import (
    JobLine,
    PostTrainingJobLogStream,
)
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder
from llama_stack_provider_moe.jobs.output import printable
from llama_stack_provider_moe.jobs.scan import saved_artifacts
from llama_stack_provider_moe.jobs.store import Job

LOG_WINDOW_BYTES = 1 << 20


def folder_of(job: Job) -> JobFolder:
    """The folder of a job, whose files are its own.

    Raises:
        Forbidden: one of them is a link, which may lead to a file of somebody else's.
    """
    folder = JobFolder(Path(job.folder))
    for path in (folder.spec, folder.resolved, folder.events, folder.output, folder.exports, folder.manifest):
        if path.is_symlink():
            raise Forbidden(f"{path.name} of job {job.id!r} is a link; only files in the job's own folder are read")
    return folder


def line(job: Job) -> JobLine:
    """A job in a list."""
    return JobLine(
        job_uuid=job.id,
        status=job.state,
        recipe=job.recipe,
        parent=job.parent,
        model=job.model,
        scheduled_at=job.scheduled_at,
        started_at=job.started_at,
        completed_at=job.ended_at,
    )


def places(job: Job) -> list[Path]:
    """Where a job keeps files: its folder, and beside it the job's own part of a `checkpoint_dir`."""
    folder = JobFolder(Path(job.folder))
    if folder.spec.is_symlink():  # such a job can still be deleted
        return [folder.root]
    try:
        checkpoints = folder.checkpoints(folder.read_spec())
    except (FileNotFoundError, ValidationError):  # without a spec, or with a damaged one, it can still be deleted
        return [folder.root]
    return [folder.root] if checkpoints.is_relative_to(folder.root) else [folder.root, checkpoints]


def disk_bytes(job: Job) -> int:
    """Bytes of all files of a job, those of its checkpoints elsewhere too; a file linked twice counts once."""
    sizes = {}
    for root in places(job):
        if root.is_symlink():  # the size of something else
            continue
        for parent, _, names in os.walk(root):
            for name in names:
                with suppress(FileNotFoundError):  # a checkpoint that is pruned now
                    found = os.lstat(os.path.join(parent, name))
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def artifacts(job: Job) -> tuple[Artifact, ...]:
    """What a job has left; while it runs, what it has saved so far."""
    return job.artifacts if job.state.ended else saved_artifacts(folder_of(job))


def log(job: Job, tail: int, offset: int | None) -> PostTrainingJobLogStream:
    """The last `tail` lines of a job's output, or the lines from byte `offset` on.

    Lines are whole (one still being written waits for the next look, unless the job has ended), at most
    `LOG_WINDOW_BYTES` of them; of a line that a progress bar wrote over with `\\r`, the last version.
    """
    try:
        file = folder_of(job).output.open("rb")
    except FileNotFoundError:
        return PostTrainingJobLogStream(job_uuid=job.id, log_lines=[], next_offset=0)
    with file:
        size = file.seek(0, 2)
        start = min(offset, size) if offset is not None else max(0, size - LOG_WINDOW_BYTES)
        file.seek(start)
        data = file.read(LOG_WINDOW_BYTES)
    whole = data.rfind(b"\n") + 1
    is_last = job.state.ended and len(data) < LOG_WINDOW_BYTES
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


def json_of(path: Path) -> dict[str, Any] | None:
    """What a file of a job holds, None where it has none; of a damaged one, what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        return {"unreadable": f"{path.name}: {error}"}
    return content if isinstance(content, dict) else {"unreadable": f"{path.name}: not an object"}
