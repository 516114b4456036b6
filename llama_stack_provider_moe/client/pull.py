"""Downloads a job's artifacts into a folder: verifies every file, and resumes interrupted downloads."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llama_stack_provider_moe.client.documents import ArtifactFile, PulledFile
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused
from llama_stack_provider_moe.ground.private import Privacy

if TYPE_CHECKING:
    from llama_stack_provider_moe.client.sync_client import Client

PART = ".part"  # suffix of a file that is not complete yet


class Puller:
    """Downloads artifacts of one job.

    Args:
        server: the server that has the job.
        job_id: name of the job.
        folder: where each artifact gets a folder of its name; created if it does not exist.
        note: called with a message for each file.
    """

    def __init__(self, server: "Client", job_id: str, folder: Path, note: Callable[[str], None]) -> None:
        self._server = server
        self._job_id = job_id
        self._folder = folder
        self._note = note

    def pull(self, names: list[str]) -> Iterator[PulledFile]:
        """Yield each file once it is complete: {artifact, path, bytes, sha256, fetched}; `fetched` counts new bytes.

        Args:
            names: artifacts to download; empty: all.

        Raises:
            InvalidInput: the artifact does not exist, or the folder can't be written.
            ServerRefused: a file does not have the server's checksum, or its name leads out of the folder.
        """
        for name in self._chosen(names):
            for file in self._server.artifact_files(self._job_id, name)["files"]:
                target = self._target(name, str(file["path"]))
                try:
                    fetched = self._file(name, file, target)
                except OSError as error:
                    raise InvalidInput("--pull", str(target), f"a place to write to ({error.strerror})") from None
                yield {"artifact": name, **file, "path": str(target), "fetched": fetched}

    def _chosen(self, names: list[str]) -> list[str]:
        there = [each["identifier"].removeprefix(f"{self._job_id}/")
                 for each in self._server.artifacts(self._job_id)["checkpoints"]]  # fmt: skip
        for name in names:
            if name not in there:
                raise InvalidInput("--only", name, f"an artifact of the job: {', '.join(there) or 'it has none'}")
        return names or there

    def _target(self, name: str, path: str) -> Path:
        inner = PurePosixPath(path).parts
        parts = [name, *inner]
        if not inner or any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise ServerRefused(
                f"the server names a file {path!r} of artifact {name!r}, which leads out of the folder", 200
            )
        return self._folder.joinpath(*parts)

    def _file(self, name: str, file: ArtifactFile, target: Path) -> int:
        """Download one file; return the number of new bytes."""
        if target.is_file() and target.stat().st_size == file["bytes"] and _sha256(target) == file["sha256"]:
            self._note(f"{target}: already downloaded")
            return 0
        Privacy().make_folder(target.parent)
        part = target.with_name(target.name + PART)
        had = part.stat().st_size if part.is_file() else 0
        fetched = self._fetch(name, file, part)
        if had and _sha256(part) != file["sha256"]:  # the partial file was of another file, or damaged
            part.unlink()
            fetched += self._fetch(name, file, part)
        found = _sha256(part)
        if found != file["sha256"]:
            part.unlink()
            raise ServerRefused(
                f"{file['path']} of {name} is damaged on the server: its sha256 is {found}; expected "
                f"{file['sha256']}", 200,
            )  # fmt: skip
        os.replace(part, target)
        self._note(f"{target}: {file['bytes']} bytes, verified")
        return fetched

    def _fetch(self, name: str, file: ArtifactFile, part: Path) -> int:
        """Append the missing bytes to `part`; return their number."""
        if part.is_file() and part.stat().st_size > file["bytes"]:
            part.unlink()
        start = part.stat().st_size if part.is_file() else 0
        if start == file["bytes"] and start:
            return 0
        came = 0
        with self._server.artifact_file(self._job_id, name, str(file["path"]), start, str(file["sha256"])) as sent:
            part_mode = "ab" if sent.is_rest else "wb"  # the server sends the whole file if it is not the one we began
            with open(part, part_mode, opener=Privacy().opener) as out:
                for chunk in sent.chunks:
                    out.write(chunk)
                    came += len(chunk)
        return came


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
