"""Lists and serves the files of a job's artifacts, with checksums, and no other files of the machine."""

import base64
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from fastapi import HTTPException
from fastapi.responses import FileResponse

from llama_stack_provider_moe.control.server import exports, views, wire
from llama_stack_provider_moe.control.store.store import Job, JobStore
from llama_stack_provider_moe.errors import InvalidInput, NotFound
from llama_stack_provider_moe.ground.small_files import real_path
from llama_stack_provider_moe.jobdir.checkpoint_index import FileSum, read_checksums, sha256_of
from llama_stack_provider_moe.jobdir.folder import Artifact

_RANGE = re.compile(r"bytes=(?:(?P<first>\d{1,18})-(?P<last>\d{1,18})?|-(?P<suffix>\d{1,18}))", re.ASCII)


class File(NamedTuple):
    """One file of an artifact."""

    path: Path  # absolute, without a link in it
    stat: os.stat_result
    sha256: str


def listing(job: Job, store: JobStore, name: str) -> wire.ArtifactFiles:
    """Return every file of the artifact `name`, of the job itself or of an export.

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
    """Return the file that the listing of `name` shows as `path`.

    Args:
        job: the job.
        store: the store that has the job's exports.
        name: the name of the artifact.
        path: the file's path in the artifact.

    Raises:
        NotFound: the listing has no such file.
    """
    _, root = _artifact(job, store, name)
    # Search the existing files; never open the path that the caller sent.
    for each, real, found in _regular(root):
        if each == path:
            return File(real, found, _sha256(real, found, _recorded(root).get(path)))
    raise NotFound(f"artifact {name!r} of job {job.id!r} has no file {path!r}")


def folder(job: Job, store: JobStore, name: str) -> Path:
    """Return the folder of the artifact `name`, once it is known to be in a folder that the job writes to.

    Raises:
        NotFound: the job has no such artifact.
    """
    return _artifact(job, store, name)[1]


def download(file: File, wanted: str | None, unless_changed: str | None) -> FileResponse:
    """Return the answer with the file, or with the part of it that the header `Range` asks for.

    Its checksum and ETag let a client resume and verify a download.

    Args:
        file: the file to send.
        wanted: the header `Range`.
        unless_changed: the header `If-Range`.

    Raises:
        InvalidInput: `Range` is not one range of bytes.
        HTTPException: 416, the range begins beyond the end of the file.
    """
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    response = FileResponse(
        file.path, stat_result=file.stat, filename=file.path.name, media_type="application/octet-stream",
        headers={
            "ETag": f'"{file.sha256}"', "Repr-Digest": f"sha-256=:{digest}:", "X-Checksum-Sha256": file.sha256,
            "X-Content-Type-Options": "nosniff",
        },
    )  # fmt: skip
    changed = unless_changed is not None and unless_changed not in (
        response.headers["etag"],
        response.headers["last-modified"],
    )
    if wanted is not None and not changed:  # otherwise the whole file is sent
        _check_range(wanted, file.stat.st_size)
    return response


def _artifact(job: Job, store: JobStore, name: str) -> tuple[Artifact, Path]:
    for given, artifact, maker in reversed(exports.listed(job, store)):
        if given == name:
            # Don't trust the path: the training process wrote it, and that runs code of models.
            try:
                root = real_path(Path(artifact.path))
            except (OSError, ValueError):
                continue
            if root.is_dir() and any(root.is_relative_to(place) and root != place for place in _homes(maker)):
                return artifact, root
    raise NotFound(f"job {job.id!r} has no artifact {name!r}")


def _homes(job: Job) -> list[Path]:
    """The folders of a job that have artifacts, without links, which someone else may have created."""
    own, *elsewhere = views.places(job)
    # The state folder may be behind a link of the operator; a `checkpoint_dir` was resolved when it was accepted.
    real = real_path(own)
    return [home for home in (real / "artifacts", real / "checkpoints", *elsewhere) if _is_real(home)]


def _is_real(path: Path) -> bool:
    try:
        return path == real_path(path)
    except OSError:  # circular links
        return False


def _regular(root: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """(relative path, real path, stat) of every file under `root`, without links that lead out of it."""
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            try:
                real = path.resolve(strict=True)
                found = real.stat()
            except (OSError, RuntimeError):  # just pruned, or a dangling or circular link
                continue
            if real.is_relative_to(root) and real.is_file():
                yield path.relative_to(root).as_posix(), real, found


def _recorded(root: Path) -> dict[str, FileSum]:
    sums = read_checksums(root)
    return {} if sums is None else sums.files


def _sha256(path: Path, found: os.stat_result, recorded: FileSum | None) -> str:
    # The checksum from when the file was written, even if it has changed since: then the client notices the change.
    return recorded.sha256 if recorded else _computed(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _computed(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """The checksum of a file, computed once for each version; size, time and inode identify the version."""
    return sha256_of(path)


def _check_range(wanted: str, size: int) -> None:
    """Raise our own error for a bad range, because Starlette's errors have a different shape."""
    found = _RANGE.fullmatch(wanted.strip())
    if found is None or (found["last"] and int(found["last"]) < int(found["first"])):
        raise InvalidInput("Range", wanted, "one range: bytes=FIRST-LAST, bytes=FIRST- or bytes=-COUNT")
    begins_inside = int(found["first"]) < size if found["first"] else size > 0 < int(found["suffix"])
    if not begins_inside:
        raise HTTPException(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"Range: {wanted} is beyond the {size} bytes of the file",
            headers={"Content-Range": f"bytes */{size}"},
        )  # fmt: skip
