"""Unpack an archive whose hash was checked: only wanted files, as plain files, to paths that we choose."""

import hashlib
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO

from llama_stack_provider_moe.errors import ExportError

_PIECE_BYTES = 1 << 20
_MOST_BYTES = 512 << 20

# Name of a member -> its path below the folder; None if it is not wanted.
Wanted = Callable[[str], str | None]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> None:
    """Check that the file has the pinned hash.

    Raises:
        ExportError: It has another hash; the file is deleted.
    """
    found = sha256(path)
    if found != expected:
        path.unlink()
        raise ExportError(f"{path.name} has sha256 {found}, not the pinned {expected}; it was not used")


def unpack(archive: Path, wanted: Wanted, folder: Path) -> list[str]:
    """Write the wanted members of a .tar.gz, .tgz, .whl or .zip below `folder`; return their names there.

    Raises:
        ExportError: A wanted member is a link or a device, its path leads outside the folder, it occurs twice, or all
            of them together are larger than expected.
    """
    done: dict[str, int] = {}
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir() and (target := wanted(info.filename)) is not None:
                    kind = info.external_attr >> 28  # the file type of st_mode; 0 if it is not recorded
                    with zipped.open(info) as stream:
                        _write(stream, info.filename, kind in (0, 8), target, folder, done)
        return sorted(done)
    with tarfile.open(archive, "r:gz") as tarred:
        for member in tarred:
            if not member.isdir() and (target := wanted(member.name)) is not None:
                taken = tarred.extractfile(member) if member.isreg() else None
                _write(taken, member.name, taken is not None, target, folder, done)
    return sorted(done)


def _write(stream: IO[bytes] | None, name: str, is_file: bool, target: str, folder: Path, done: dict[str, int]) -> None:
    path = PurePosixPath(target)
    if stream is None or not is_file:
        raise ExportError(f"{name} in the archive is not a plain file; the archive was not used")
    if path.is_absolute() or ".." in path.parts or "\\" in target or target in done or not path.parts:
        raise ExportError(f"{name} in the archive would be written to {target}, which is outside the folder or exists")
    out = folder / path
    out.parent.mkdir(parents=True, exist_ok=True)
    done[target] = 0
    with out.open("xb") as file:
        while piece := stream.read(_PIECE_BYTES):
            done[target] += len(piece)
            if sum(done.values()) > _MOST_BYTES:
                raise ExportError(f"{name}: the archive is larger than the {_MOST_BYTES:,} bytes expected at most")
            file.write(piece)
