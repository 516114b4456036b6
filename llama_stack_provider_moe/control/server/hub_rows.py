"""Data sets of the Hugging Face hub that are registered on the host (`huggingface://datasets/OWNER/NAME?split=train`).

The address gives the host's provider `remote::huggingface` the arguments of `datasets.load_dataset`. Among these are
some that read any file of the machine or write to any folder, so we accept the few that name rows of a data set.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any, Protocol, cast
from urllib.parse import parse_qs, urlsplit

SCHEME = "huggingface"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"{_PART}(/{_PART})?")
_ARGUMENTS = ("split", "name", "revision", "data_dir", "data_files")
_PATHS = ("data_dir", "data_files")


class Rows(Protocol):
    """A loaded split, which is mapped from the disk."""

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows."""

    def to_list(self) -> list[object]:
        """The rows as dictionaries."""


def arguments(uri: str) -> tuple[str, dict[str, str]]:
    """Return the data set's id and the named arguments of an address.

    Raises:
        ValueError: it is no such address, or asks for more than rows of a data set of the hub.
    """
    parts = urlsplit(uri)
    name, given = parts.path.lstrip("/"), parse_qs(parts.query)
    if parts.scheme.lower() != SCHEME or not _ID.fullmatch(name) or ".." in name:
        raise ValueError("expected huggingface://datasets/OWNER/NAME?split=train")
    if unknown := sorted(given.keys() - set(_ARGUMENTS)):
        raise ValueError(f"{unknown[0]}: expected arguments among {', '.join(_ARGUMENTS)}")
    for key in _PATHS:
        for path in given.get(key, ()):
            if "/" not in name:  # the id of a reader of files, such as json
                raise ValueError(f"{key}: expected a data set with its owner (OWNER/NAME)")
            if path.startswith(("/", "~")) or ":" in path or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{key}: expected a path in the data set")
    return name, {key: values[0] for key, values in given.items()}


def loaded(uri: str) -> Rows:
    """Load a split; this may download it.

    Raises:
        ValueError, OSError, ImportError: there is none, or it can't be read.
    """
    name, given = arguments(uri)
    if not given.get("split"):
        raise ValueError("split: expected a part of the data set, such as ?split=train")
    datasets = import_module("datasets")
    try:
        return cast("Rows", undecoded(datasets.load_dataset(name, **given)))
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error)) from error


def undecoded(rows: Any) -> Any:
    """The same split, whose images are `{"bytes": ..., "path": ...}`: a server decodes none."""
    datasets = import_module("datasets")
    one = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, one)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of them
            rows = rows.cast_column(name, type(feature)(one))
    return rows


def page(rows: Rows, start: int, count: int) -> list[object]:
    """Return at most `count` rows from row `start` on."""
    return rows.select(range(start, min(start + count, len(rows)))).to_list()
