"""Answers of the routes for data sets that owners upload."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from llama_stack_provider_moe.control.store.feedback_files import Only
from llama_stack_provider_moe.spec.data_profile import DataProfile


class DatasetVersionInfo(BaseModel):
    """One version of a data set."""

    sha256: str = Field(description="SHA-256 of the stored rows; its first digits name the version, as in NAME@3fa8c1.")
    rows: int
    bytes: int = Field(
        description="Size of the stored rows (JSON Lines, uncompressed) and of their images, at least 4 KiB each."
    )
    columns: dict[str, int] = Field(
        description="Number of rows with a value, by column; of a data set with more than 256 columns, the first 256."
    )
    created_at: datetime


class PushedDataset(DatasetVersionInfo):
    """The version that an upload made, or found."""

    name: str
    is_new: bool = Field(description="False if the same rows were stored under this name before.")
    received_bytes: int = Field(description="Size of the request's body.")
    received_sha256: str = Field(description="SHA-256 of the request's body.")


class DatasetLine(BaseModel):
    """A data set in a list: its current version, and the size of all."""

    name: str
    sha256: str
    rows: int
    bytes: int
    created_at: datetime
    versions: int = Field(description="Number of versions.")
    total_bytes: int = Field(description="Size of all versions; it counts towards the owner's quota.")


class ListDatasetsResponse(BaseModel):
    """The caller's data sets, by name."""

    data: list[DatasetLine]
    has_more: bool
    used_bytes: int = Field(description="Size of all data sets of the caller.")
    quota_bytes: int = Field(description="`dataset_quota_bytes` of this server.")


class Dataset(BaseModel):
    """A data set and its versions, the current one first."""

    name: str
    versions: list[DatasetVersionInfo]
    has_more: bool


class DatasetRows(BaseModel):
    """A page of the rows of one version."""

    name: str
    sha256: str = Field(description="SHA-256 of the version.")
    rows: list[object] = Field(description="Rows as they were uploaded, each image as its SHA-256, format and size.")
    cursor: int = Field(description="Parameter `cursor` of the next page.")
    has_more: bool


class DeletedDataset(BaseModel):
    """What was deleted."""

    name: str
    versions: list[str] = Field(description="SHA-256 of each deleted version.")
    bytes: int = Field(description="Size of the deleted versions.")


class DatasetProfile(BaseModel):
    """The profile of one version, or the news that it is being made."""

    name: str
    sha256: str = Field(description="SHA-256 of the version.")
    is_ready: bool = Field(description="False while the profile is being made; ask again.")
    profile: DataProfile | None = Field(description="The figures of `moe-train data check`; null until it is ready.")


class FeedbackBody(BaseModel):
    """Which flagged conversations become a version of a data set."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the data set.")
    only: Only = Field(
        default="all",
        description="all: every conversation that shields flagged, for a probe or a measurement; answered: those that "
        "end with an answer, for recipes that learn answers.",
    )
    shield: str | None = Field(
        default=None, max_length=128, description="Only what this shield flagged; left out: any shield."
    )
    everybody: bool = Field(
        default=False,
        description="Those of every user (with tenants, of the caller's tenant); only for administrators. False: the "
        "caller's own.",
    )


class KeptFeedback(BaseModel):
    """The caller's flagged conversations."""

    rows: int = Field(description="Number of different conversations.")
    answered: int = Field(description="Number of those that end with an answer.")
    bytes: int = Field(description="Size of what is kept.")
    left_out: int = Field(
        description="Number of further ones that no job could take, such as those with a tool call that is not JSON."
    )


class ErasedFeedback(BaseModel):
    """What was deleted of the caller's flagged conversations."""

    bytes: int = Field(description="Size of what was deleted. Data sets and jobs keep their copies of the rows.")
