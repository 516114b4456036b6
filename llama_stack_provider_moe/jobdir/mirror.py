"""`Mirror`: copies of a job's checkpoints and artifacts at an fsspec URL (`s3://bucket/prefix`, `file:///...`).

Object stores can't rename, so a copy counts only if it has its `checksums.json`, which is written last and removed
first. Fetched files are checked against it, byte by byte, before the local folder gets its name.

Each job has its own prefix in the mirror, recorded in its folder (`mirror.json`). A deleted job and a later one with
the same id never share a prefix.
"""

import fcntl
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import Field, ValidationError

from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, Checksums, read_checksums, verify_files
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import Block

_PIECE_BYTES = 8 << 20


class MirrorRecord(Block):
    """`mirror.json`: where copies of a job are or may be."""

    urls: list[str] = Field(description="Prefixes of this job, the newest last.")


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn the errors of each scheme's library (botocore's are not OSErrors) into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class Mirror:
    """The copies of one job.

    Args:
        url: The job's own prefix.

    Raises:
        OSError: The place can't be reached, or the package for its scheme is not installed. All methods raise it, too.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # A cached listing would hide files that another process has written.
        self._is_folder = url.startswith("file:")
        options = {"auto_mkdir": True} if self._is_folder else {"use_listings_cache": False}
        with _as_os_error():
            import fsspec  # only needed with a mirror

            self._system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
        self._root = str(path).rstrip("/")

    @classmethod
    def of(cls, folder: JobFolder, base: str) -> "Mirror":
        """Return the mirror of a job under the common prefix `base`; the first call chooses the job's own prefix."""
        places = read_places(folder)
        known = [url for url in places.urls if url.rpartition("/")[0] == base.rstrip("/")]
        if not known:
            known = [f"{base.rstrip('/')}/{folder.root.name}.{uuid.uuid4().hex}"]
            write_atomic(folder.mirror, MirrorRecord(urls=[*places.urls, *known]))
        return cls(known[-1])

    @_as_os_error()
    def names(self) -> list[str]:
        """Return the names of complete copies, such as `checkpoints/epoch-1`."""
        try:
            found = self._system.find(self._root)
        except FileNotFoundError:
            return []
        inside = (str(path)[len(self._root) :].strip("/") for path in found)
        return sorted(path.removesuffix(f"/{CHECKSUMS}") for path in inside if path.endswith(f"/{CHECKSUMS}"))

    @_as_os_error()
    def put(self, folder: Path, name: str, sent_bytes: Callable[[int], None] = lambda count: None) -> int:
        """Copy a published folder; it replaces an earlier copy with the same name.

        Args:
            folder: The folder.
            name: Name of the copy.
            sent_bytes: Called with the number of bytes of each piece that was sent.

        Returns:
            The number of bytes sent; 0 if the same copy already exists.

        Raises:
            OSError: The copy is not complete, and is not listed.
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
            self._send(folder / path, f"{there}/{path}", sent_bytes)
            size = self._system.size(f"{there}/{path}")
            if size != expected.bytes:
                raise OSError(f"{path} has {size} bytes there, {expected.bytes} were sent")
            sent += expected.bytes
        self._system.put_file(str(folder / CHECKSUMS), f"{there}/{CHECKSUMS}")
        return sent

    def _send(self, source: Path, target: str, sent_bytes: Callable[[int], None]) -> None:
        if not self._is_folder:
            self._system.put_file(str(source), target, callback=_counting(sent_bytes))
            return
        # fsspec copies a local file in one call without progress.
        with source.open("rb") as file, self._system.open(target, "wb") as copy:
            while piece := file.read(_PIECE_BYTES):
                copy.write(piece)
                sent_bytes(len(piece))

    @_as_os_error()
    def fetch(self, name: str, folder: Path) -> bool:
        """Fetch a copy to `folder`, completely or not at all; return False if another process just did.

        Raises:
            OSError: The copy can't be read, or is damaged.
        """
        with _exclusive(folder), ExitStack() as stack:
            if folder.exists():
                return False
            coming = folder.with_name(f".{folder.name}.coming")
            shutil.rmtree(coming, ignore_errors=True)
            there = f"{self._root}/{name}"
            sums = self._sums(there)
            if sums is None:
                raise FileNotFoundError(f"{self.url}/{name} is not complete")
            try:
                coming.mkdir(parents=True)
                counter = stack.enter_context(liveness.stage(f"fetching {name}", _bytes_of(sums), "bytes"))
                for path in [*sums.files, CHECKSUMS]:
                    target = coming / path
                    if not target.resolve().is_relative_to(coming.resolve()):
                        raise OSError(f"{self.url}/{name}/{CHECKSUMS} names {path!r}, outside its folder")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._fetch_file(f"{there}/{path}", target, counter.advance)
                if (wrong := verify_files(coming)) is not None:
                    raise OSError(f"{self.url}/{name}: {wrong}")
                coming.rename(folder)
            finally:
                shutil.rmtree(coming, ignore_errors=True)
        return True

    def _fetch_file(self, source: str, target: Path, fetched_bytes: Callable[[int], None]) -> None:
        if not self._is_folder:
            self._system.get_file(source, str(target), callback=_counting(fetched_bytes))
            return
        with self._system.open(source, "rb") as copy, target.open("wb") as file:
            while piece := copy.read(_PIECE_BYTES):
                file.write(piece)
                fetched_bytes(len(piece))

    @_as_os_error()
    def remove(self, name: str = "") -> None:
        """Delete a copy; without a name, all copies of the job.

        Raises:
            OSError: Some files could not be deleted.
        """
        there = f"{self._root}/{name}".rstrip("/")
        with suppress(FileNotFoundError):
            if name:
                self._system.rm_file(f"{there}/{CHECKSUMS}")
        with suppress(FileNotFoundError):
            self._system.rm(there, recursive=True)

    def _sums(self, there: str) -> Checksums | None:
        try:
            return read_as(Checksums, self._system.cat_file(f"{there}/{CHECKSUMS}"))
        except (FileNotFoundError, ValidationError):
            return None


def _bytes_of(sums: Checksums) -> int:
    return sum(each.bytes for each in sums.files.values())


def _counting(tell: Callable[[int], None]) -> object:
    """Return an fsspec callback that calls `tell` with the number of bytes of each piece."""
    from fsspec.callbacks import Callback  # only called with a mirror, which needs fsspec

    class Counting(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            tell(inc)

        def absolute_update(self, value: int) -> None:
            before = self.value
            super().absolute_update(value)
            tell(value - before)

    return Counting()


def read_places(folder: JobFolder) -> MirrorRecord:
    """Read where copies of a job may be."""
    try:
        return read_as(MirrorRecord, folder.mirror.read_bytes())
    except FileNotFoundError:
        return MirrorRecord(urls=[])


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Allow one process of this machine at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".fetching").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
