"""`Mirror`: a second place of a job's checkpoints and artifacts, at an fsspec URL (`s3://bucket/prefix`, `file:///...`).

Object stores rename nothing, so a copy is listed by what is written last and removed first: its `checksums.json`. What
is fetched is checked against it, byte by byte, before it gets its name here.

Each job has a prefix of its own there, which its folder knows (`mirror.json`): a job that is deleted and another of the
same id never share one.
"""

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from llama_stack_provider_moe.jobs.checkpoint_index import CHECKSUMS, Checksums, read_checksums, verify_files
from llama_stack_provider_moe.jobs.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import Block


class Places(Block):
    """`mirror.json`: where copies of a job are, or may be."""

    urls: list[str] = Field(description="The job's own prefixes, the newest last.")


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Each scheme's library has errors of its own (botocore's are no OSError); here they are one kind."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Mirror:
    """The copies of one job.

    Args:
        url: the job's own prefix.

    Raises:
        OSError: of each method and of this: the place can't be reached, or the package for its scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # A listing that is remembered would hide what another process has written.
        options: dict[str, Any] = {"auto_mkdir": True} if url.startswith("file:") else {"use_listings_cache": False}
        with _as_os_error():
            import fsspec  # neither server nor child needs it without a mirror

            self._system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
        self._root = str(path).rstrip("/")

    @classmethod
    def of(cls, folder: JobFolder, base: str) -> "Mirror":
        """That of a job under the prefix `base` of all jobs; its own prefix is made up at the first call."""
        places = read_places(folder)
        known = [url for url in places.urls if url.rpartition("/")[0] == base.rstrip("/")]
        if not known:
            known = [f"{base.rstrip('/')}/{folder.root.name}.{uuid.uuid4().hex}"]
            write_atomic(folder.mirror, Places(urls=[*places.urls, *known]))
        return cls(known[-1])

    @_as_os_error()
    def names(self) -> list[str]:
        """Of what was copied whole, such as `checkpoints/epoch-1`."""
        try:
            found = self._system.find(self._root)
        except FileNotFoundError:
            return []
        inside = (str(path)[len(self._root) :].strip("/") for path in found)
        return sorted(path.removesuffix(f"/{CHECKSUMS}") for path in inside if path.endswith(f"/{CHECKSUMS}"))

    @_as_os_error()
    def put(self, folder: Path, name: str) -> int:
        """Copy a published folder, in the place of an earlier one of its name; bytes sent, 0 where it is there already.

        Raises:
            OSError: it is not whole there, and not listed.
        """
        sums = read_checksums(folder)
        if sums is None:
            raise FileNotFoundError(f"{folder} has no {CHECKSUMS}")
        there = f"{self._root}/{name}"
        if self._sums(there) == sums:
            return 0
        self.remove(name)
        sent = 0
        for path, expected in sums.files.items():
            self._system.put_file(str(folder / path), f"{there}/{path}")
            size = self._system.size(f"{there}/{path}")
            if size != expected.bytes:
                raise OSError(f"{path} has {size} bytes there, {expected.bytes} were sent")
            sent += expected.bytes
        self._system.put_file(str(folder / CHECKSUMS), f"{there}/{CHECKSUMS}")
        return sent

    @_as_os_error()
    def fetch(self, name: str, folder: Path) -> bool:
        """Bring a copy back as `folder`, whole or not at all; False where somebody else just did.

        Raises:
            OSError: it can't be read, or is not what was sent.
        """
        with _alone(folder):
            if folder.exists():
                return False
            coming = folder.with_name(f".{folder.name}.coming")
            shutil.rmtree(coming, ignore_errors=True)
            there = f"{self._root}/{name}"
            sums = self._sums(there)
            if sums is None:
                raise FileNotFoundError(f"{self.url}/{name} is not whole")
            try:
                coming.mkdir(parents=True)
                for path in [*sums.files, CHECKSUMS]:
                    target = coming / path
                    if not target.resolve().is_relative_to(coming.resolve()):
                        raise OSError(f"{self.url}/{name}/{CHECKSUMS} names {path!r}, outside its folder")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._system.get_file(f"{there}/{path}", str(target))
                if (wrong := verify_files(coming)) is not None:
                    raise OSError(f"{self.url}/{name}: {wrong}")
                coming.rename(folder)
            finally:
                shutil.rmtree(coming, ignore_errors=True)
        return True

    @_as_os_error()
    def remove(self, name: str = "") -> None:
        """Forget a copy; without a name all of the job's.

        Raises:
            OSError: something of it is left.
        """
        there = f"{self._root}/{name}".rstrip("/")
        with suppress(FileNotFoundError):
            if name:
                self._system.rm_file(f"{there}/{CHECKSUMS}")
        with suppress(FileNotFoundError):
            self._system.rm(there, recursive=True)

    def _sums(self, there: str) -> Checksums | None:
        try:
            return Checksums.model_validate_json(self._system.cat_file(f"{there}/{CHECKSUMS}"))
        except (FileNotFoundError, ValidationError):
            return None


def read_places(folder: JobFolder) -> Places:
    """Where copies of a job may be."""
    try:
        return Places.model_validate_json(folder.mirror.read_bytes())
    except FileNotFoundError:
        return Places(urls=[])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of a machine at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".fetching").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
