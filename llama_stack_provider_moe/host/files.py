"""The files of a job's artifacts: which there are, what their checksums are, and no other file of the machine."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.host import exports, views, wire
from llama_stack_provider_moe.jobs.checkpoint_index import FileSum, read_checksums, sha256_of
from llama_stack_provider_moe.jobs.folder import Artifact
from llama_stack_provider_moe.jobs.store import Job, JobStore


class File(NamedTuple):
    """One file of an artifact."""

    path: Path  # absolute, without a link in it
    stat: os.stat_result
    sha256: str


def listing(job: Job, store: JobStore, name: str) -> wire.ArtifactFiles:
    """Every file of the artifact `name`, the job's own or an export's.

    Raises:
        NotFound: the job has no such artifact.
    """
    artifact, root = _artifact(job, store, name)
    recorded = _recorded(root)
    files = [
        wire.ArtifactFile(path=path, bytes=found.st_size, sha256=_sha256(real, found, recorded.get(path)))
        for path, real, found in _regular(root)
    ]
    return wire.ArtifactFiles(
        identifier=f"{job.id}/{name}", kind=artifact.kind, bytes=sum(file.bytes for file in files), files=files
    )


def file(job: Job, store: JobStore, name: str, path: str) -> File:
    """The file that a listing of `name` has as `path`.

    Raises:
        NotFound: none has.
    """
    _, root = _artifact(job, store, name)
    # Looked for among those that are there, never opened by the name that was asked for.
    for each, real, found in _regular(root):
        if each == path:
            return File(real, found, _sha256(real, found, _recorded(root).get(path)))
    raise NotFound(f"artifact {name!r} of job {job.id!r} has no file {path!r}")


def _artifact(job: Job, store: JobStore, name: str) -> tuple[Artifact, Path]:
    for given, artifact, maker in reversed(exports.listed(job, store)):
        if given == name:
            root = Path(artifact.path).resolve()
            # The path was written by the training process, which runs what a model brings.
            if root.is_dir() and any(root.is_relative_to(place) and root != place for place in _homes(maker)):
                return artifact, root
    raise NotFound(f"job {job.id!r} has no artifact {name!r}")


def _homes(job: Job) -> list[Path]:
    """The folders of a job that hold artifacts; none that a link stands for, which others may have put there."""
    own, *elsewhere = views.places(job)
    # The state folder may lie behind a link of the operator's; a `checkpoint_dir` was resolved when it was accepted.
    homes = [own.resolve() / "artifacts", own.resolve() / "checkpoints", *elsewhere]
    return [home for home in homes if home == home.resolve()]


def _regular(root: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """(path within, real path, stat) of every file under `root`; links that lead out of it are passed over."""
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            try:
                real = path.resolve(strict=True)
                found = real.stat()
            except (OSError, RuntimeError):  # pruned now; a link to nothing or in a circle
                continue
            if real.is_relative_to(root) and real.is_file():
                yield path.relative_to(root).as_posix(), real, found


def _recorded(root: Path) -> dict[str, FileSum]:
    sums = read_checksums(root)
    return {} if sums is None else sums.files


def _sha256(path: Path, found: os.stat_result, recorded: FileSum | None) -> str:
    # What was recorded when the file was written, even where it has changed since: then whoever fetches it finds out.
    return recorded.sha256 if recorded else _computed(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _computed(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """Read once for each version of a file: the numbers say which version it is."""
    return sha256_of(path)
