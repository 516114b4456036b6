"""The files of uploaded data sets: how one arrives, becomes a version, and is deleted; nothing stays half done.

state_dir/datasets/
  .lock               held while a version is added or deleted, by one process at a time
  incoming/<id>       rows that are arriving; the process that writes the file has it locked
  incoming/<id>.images  their images
  <id>/rows.jsonl     the rows of a version, which the store knows
  <id>/images/        their images (`image_folder`)

A process that dies leaves an unlocked file in `incoming` with its images, or a folder that the store does not know.
`sweep` removes both, and each server calls it when it starts.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from sqlalchemy.exc import SQLAlchemyError

from llama_stack_provider_moe.control.store.dataset_rows import DatasetTable, DatasetVersion, new_version
from llama_stack_provider_moe.control.store.image_folder import ImageFolder, beside
from llama_stack_provider_moe.errors import TooLarge
from llama_stack_provider_moe.spec.server_config import ProviderConfig

ROWS_FILE = "rows.jsonl"
_IMAGES = ".images"  # end of the name of a folder in `incoming`
log = logging.getLogger(__name__)


def rows_of(config: ProviderConfig, dataset_id: str) -> Path:
    """Return the file with the rows of a version."""
    return config.datasets_dir / dataset_id / ROWS_FILE


class Room(NamedTuple):
    """How large an arriving file may become, and the text of the error of a larger one."""

    bytes: int
    why: str
    quota_bytes: int | None = None  # of all data sets of its owner; None: the server's `dataset_quota_bytes`
    setting: str = "dataset_quota_bytes"  # that sets the quota


class Arriving:
    """A file in `incoming` that rows are written to. Close it in the end; unless it was kept, that deletes it.

    Args:
        config: The server's configuration.
        room: Largest size.

    Attributes:
        bytes: Size so far, images included.
        images: The images of its rows.
    """

    def __init__(self, config: ProviderConfig, room: Room) -> None:
        self._config = config
        self._room = room
        self._id = uuid.uuid4().hex
        self._path = _incoming(config) / self._id
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.images = ImageFolder(self._path.with_name(self._id + _IMAGES), config.privacy, self._admit)
        with locked(config):  # or `sweep` could find it before it is locked
            self._file = config.privacy.new_file(self._path)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: bytes) -> None:
        """Append a line; raise `TooLarge` if there is no room for it."""
        self._admit(len(line))
        self._file.write(line)
        self._sha256.update(line)

    def flush(self) -> None:
        """Give what was written to the file system, which raises `OSError` if the disk is full."""
        self._file.flush()

    def sync(self) -> None:
        """Write the file and the images to the disk; call it before `keep`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.images.sync()

    def keep(
        self, table: DatasetTable, owner: str, name: str, rows: int, columns: dict[str, int]
    ) -> tuple[DatasetVersion, bool]:
        """Make the file a version of a data set; the same content again changes nothing but which version is current.

        Args:
            table: The store's data sets.
            owner: Owner of the data set.
            name: Its name.
            rows: Number of lines.
            columns: Number of rows with a value, by column.

        Returns:
            The version, and whether it is new.

        Raises:
            TooLarge: It would exceed the owner's quota.
            SQLAlchemyError: The store failed. The file stays if it is unknown whether the store has the version.
        """
        new = new_version(self._id, owner, name, self._sha256.hexdigest(), rows, self.bytes, columns)
        folder = rows_of(self._config, self._id).parent
        given = self._room.quota_bytes
        quota_bytes = self._config.dataset_quota_bytes if given is None else given
        with locked(self._config):
            try:
                self._config.privacy.make_folder(folder)
                if self.images.path.exists():
                    self.images.path.rename(beside(folder / ROWS_FILE))
                self._path.rename(folder / ROWS_FILE)
                _sync(folder)
                _sync(folder.parent)
                stored, is_new = _added(table, new, quota_bytes, self._room.setting)
            except _Unknown as unknown:
                raise unknown.error from None
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            if not is_new:
                shutil.rmtree(folder, ignore_errors=True)
        return stored, is_new

    def close(self) -> None:
        """Close the file, and delete it unless it was kept."""
        with suppress(OSError):  # a full disk refuses the rest of the buffer
            self._file.close()
        shutil.rmtree(self.images.path, ignore_errors=True)  # before the file, by which `sweep` knows that it is in use
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _admit(self, size_bytes: int) -> None:
        if self.bytes + size_bytes > self._room.bytes:
            raise TooLarge(self._room.why)
        self.bytes += size_bytes


def remove(
    config: ProviderConfig, table: DatasetTable, owner: str, name: str, version: str | None
) -> list[DatasetVersion]:
    """Delete one version of a data set, or all with None. A job that is reading the rows reads on.

    Args:
        config: The server's configuration.
        table: The store's data sets.
        owner: Owner of the data set.
        name: Its name.
        version: The beginning of the version's SHA-256.

    Raises:
        NotFound: The owner has no such data set or version.
        InvalidInput: `version` fits several versions, or no SHA-256.
    """
    with locked(config):
        gone = table.delete(owner, name, version)
        for each in gone:
            shutil.rmtree(rows_of(config, each.id).parent, ignore_errors=True)
    return gone


def sweep(config: ProviderConfig, table: DatasetTable) -> None:
    """Create the folders, and delete the files of uploads and deletions that a dead process did not finish."""
    config.privacy.make_folder(_incoming(config))
    with locked(config):
        for path in _incoming(config).iterdir():
            if path.name.endswith(_IMAGES):
                if _is_unlocked(path.with_suffix("")):
                    shutil.rmtree(path, ignore_errors=True)
            elif _is_unlocked(path):
                shutil.rmtree(path.with_name(path.name + _IMAGES), ignore_errors=True)
                path.unlink(missing_ok=True)
        known = table.ids()
        for folder in config.datasets_dir.iterdir():
            if folder.name not in known and folder != _incoming(config) and folder.is_dir() and not folder.is_symlink():
                log.warning("%s belongs to no data set in the store; it is deleted", folder)
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(config: ProviderConfig) -> Iterator[None]:
    """Allow one change at a time among all processes that share the state folder."""
    with config.privacy.appended(config.datasets_dir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _incoming(config: ProviderConfig) -> Path:
    return config.datasets_dir / "incoming"


def _is_unlocked(path: Path) -> bool:
    """Whether no process is writing a file, which may be gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:  # another process is writing it
        return False
    return True


class _Unknown(Exception):
    """It is unknown whether the store has the version."""

    def __init__(self, error: SQLAlchemyError) -> None:
        super().__init__(str(error))
        self.error = error


def _added(table: DatasetTable, new: DatasetVersion, quota_bytes: int, setting: str) -> tuple[DatasetVersion, bool]:
    try:
        return table.add(new, quota_bytes, setting)
    except SQLAlchemyError as error:
        if table.is_embedded:
            raise
        # A commit whose answer was lost may have happened, or may still be under way. A second one waits for it, and
        # then finds the version.
        try:
            stored, is_new = table.add(new, quota_bytes, setting)
        except SQLAlchemyError:
            log.exception("data set %s: it is unknown whether the store has it; its file stays for now", new.id)
            raise _Unknown(error) from None
        return stored, is_new or stored.id == new.id


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
