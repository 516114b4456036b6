"""A job's artifacts from the server into a folder: every file checked, and what was broken off gone on with."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llama_stack_provider_moe.cli.server import Server
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused

PART = ".part"  # ends the name of a file that is not whole yet


class Puller:
    """Fetches artifacts of one job.

    Args:
        server: that has it.
        job_id: the job.
        folder: where each artifact gets a folder of its name; made if need be.
        note: told of each file.
    """

    def __init__(self, server: Server, job_id: str, folder: Path, note: Callable[[str], None]) -> None:
        self._server = server
        self._job_id = job_id
        self._folder = folder
        self._note = note

    def pull(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Each file as it is there: {artifact, path, bytes, sha256, fetched}; `fetched`: bytes that had to come.

        Args:
            names: of the artifacts; none: all.

        Raises:
            InvalidInput: no such artifact, or a folder that can't be written.
            ServerRefused: a file is not what the server's checksum says, or its name leads elsewhere.
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
            raise ServerRefused(f"the server names a file {path!r} of artifact {name!r}, which leads elsewhere", 200)
        return self._folder.joinpath(*parts)

    def _file(self, name: str, file: dict[str, Any], target: Path) -> int:
        """Bytes that had to be fetched."""
        if target.is_file() and target.stat().st_size == file["bytes"] and _sha256(target) == file["sha256"]:
            self._note(f"{target}: there already")
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + PART)
        had = part.stat().st_size if part.is_file() else 0
        fetched = self._fetch(name, file, part)
        if had and _sha256(part) != file["sha256"]:  # what was there was of something else, or broken
            part.unlink()
            fetched += self._fetch(name, file, part)
        found = _sha256(part)
        if found != file["sha256"]:
            part.unlink()
            raise ServerRefused(
                f"{file['path']} of {name} is broken on the server: its sha256 is {found}, and {file['sha256']} was "
                "written", 200,
            )  # fmt: skip
        os.replace(part, target)
        self._note(f"{target}: {file['bytes']} bytes, checked")
        return fetched

    def _fetch(self, name: str, file: dict[str, Any], part: Path) -> int:
        """Append to `part` what it lacks; bytes that came."""
        if part.is_file() and part.stat().st_size > file["bytes"]:
            part.unlink()
        start = part.stat().st_size if part.is_file() else 0
        if start == file["bytes"] and start:
            return 0
        came = 0
        with self._server.artifact_file(self._job_id, name, str(file["path"]), start, str(file["sha256"])) as sent:
            part_mode = "ab" if sent.is_rest else "wb"  # all of it comes where the file is another one than ours was
            with part.open(part_mode) as out:
                for chunk in sent.chunks:
                    out.write(chunk)
                    came += len(chunk)
        return came


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
