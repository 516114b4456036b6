"""Documents of the server's API about uploaded data sets, as far as clients read them."""

from typing import TypedDict


class DatasetVersion(TypedDict):
    """One version of an uploaded data set."""

    sha256: str
    rows: int
    bytes: int
    columns: dict[str, int]
    created_at: str


class PushedDataset(DatasetVersion):
    """The version that an upload made, or found."""

    name: str
    is_new: bool
    received_bytes: int
    received_sha256: str


class DatasetLine(TypedDict):
    """A data set in a list."""

    name: str
    sha256: str
    rows: int
    bytes: int
    created_at: str
    versions: int
    total_bytes: int


class DatasetList(TypedDict):
    """A page of data sets."""

    data: list[DatasetLine]
    has_more: bool
    used_bytes: int
    quota_bytes: int


class Dataset(TypedDict):
    """A data set and its versions, the current one first."""

    name: str
    versions: list[DatasetVersion]
    has_more: bool


class DatasetProfile(TypedDict):
    """What a job would make of a version of a data set; `profile` is None until it is ready."""

    name: str
    sha256: str
    is_ready: bool
    profile: dict[str, object] | None


class DeletedDataset(TypedDict):
    """The versions that were deleted."""

    name: str
    versions: list[str]
    bytes: int


class KeptFeedback(TypedDict):
    """The caller's flagged conversations: different ones, and those that end with an answer."""

    rows: int
    answered: int
    bytes: int
    left_out: int


class ErasedFeedback(TypedDict):
    """What was deleted of them."""

    bytes: int
