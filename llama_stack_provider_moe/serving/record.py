"""`served.json` in the folder of an export: the model that it puts, or has put, on an inference server."""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from llama_stack_provider_moe.ground.small_files import read_small
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import Block


class PlacedFile(Block):
    """What identifies the file that was placed in a folder, so that no other file is taken for it."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "PlacedFile":
        """The identity of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        found = path.lstat()
        return cls(device=found.st_dev, inode=found.st_ino, bytes=found.st_size, mtime_ns=found.st_mtime_ns)

    def is_at(self, path: Path) -> bool:
        """Whether the file at a path is this one."""
        try:
            return PlacedFile.of(path) == self
        except FileNotFoundError:
            return False


class ServedRecord(Block):
    """A model on an inference server."""

    kind: Literal["llama_cpp", "ollama", "vllm"]
    provider_id: str
    name: str = Field(pattern=r"^ft-[A-Za-z0-9._-]{1,77}$", description="Name of the model on the server.")
    served_at: datetime | None = Field(default=None, description="When it gave its first answer; null before.")
    file: PlacedFile | None = Field(default=None, description="Its file, for a server that serves a folder.")

    @property
    def model_id(self) -> str:
        """The id of the model in the host's inference."""
        return f"{self.provider_id}/{self.name}"


def write_record(folder: JobFolder, record: ServedRecord) -> None:
    """Write the record of an export."""
    write_atomic(folder.served, record)


def read_record(folder: JobFolder) -> ServedRecord | None:
    """Read the record of an export; None if it has put nothing on a server.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged.
    """
    try:
        return read_as(ServedRecord, read_small(folder.served))
    except FileNotFoundError:
        return None
