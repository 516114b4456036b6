"""Where the rows of a job came from: `data/sources.json` in its folder, written by the server at submission."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, TypeAdapter

from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.reading import read_with

SourceKind = Literal["data", "host data set", "host file", "flagged conversations"]
SOURCES_FILE = "sources.json"
_VERSION_DIGITS = 12


class DataSource(BaseModel):
    """The data set that one part of a job's rows was copied from."""

    kind: SourceKind | str = Field(
        description="`data`: the owner's upload; `host data set`; `host file`; `flagged conversations` of shields."
    )
    id: str = Field(description="Its name, or its id on the host.")
    version: str | None = Field(description="SHA-256 of the version that was copied; null for the host's.")
    rows: int = Field(description="Number of rows that were copied.")

    def __str__(self) -> str:
        version = "" if self.version is None else f", version {self.version[:_VERSION_DIGITS]}"
        kind = "uploaded data set" if self.kind == "data" else self.kind
        return f"{kind} {self.id!r}{version}: {self.rows:,} rows"


_SOURCES: TypeAdapter[dict[str, DataSource]] = TypeAdapter(dict[str, DataSource])


def write_sources(folder: JobFolder, sources: dict[str, DataSource], mode: int) -> None:
    """Write the sources of a job's rows by part.

    Args:
        folder: The job's folder.
        sources: Part (`RowSource.part`) -> data set.
        mode: Mode of the file.
    """
    write_atomic(_path(folder), _SOURCES.dump_json(sources, indent=2).decode(), mode)


def read_sources(folder: JobFolder) -> dict[str, DataSource] | None:
    """Read the sources of a job's rows by part; None for a job of a version that did not record them.

    Raises:
        ValidationError: The file is damaged.
    """
    try:
        return read_with(_SOURCES, _path(folder).read_bytes())
    except FileNotFoundError:
        return None


def source_lines(folder: JobFolder) -> list[str]:
    """Return a line for each data set of a job, for its plan."""
    return [f"{part}: {source}" for part, source in (read_sources(folder) or {}).items()]


def _path(folder: JobFolder) -> Path:
    return folder.data / SOURCES_FILE
