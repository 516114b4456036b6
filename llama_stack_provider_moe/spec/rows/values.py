"""One row while it is read: its columns, which of them were read, and the checks of single values."""

import json
import math
from collections.abc import Mapping
from typing import Final

MOST_DEPTH: Final = 64  # of lists and objects in each other: more would exceed the limits of JSON readers
MOST_BITS: Final = 8192  # of an integer: Python refuses to write one of more than 4,300 digits
HALF_A_PAIR: Final = "contains half of a surrogate pair, which is not valid text"


class BadRow(Exception):
    """The problem of the row that is being read: the path of the value, and what is wrong with it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


class Source:
    """A row's columns by the format's names, and a record of what was read.

    Attributes:
        columns: the columns that this row has, without those that are None or NaN.
        answered: whether a conversation must end with the assistant's turn.
        no_images: why the job takes no images; None: it takes them.
        read: names of the columns that were read.
        unread: keys inside columns, such as `messages[].id`, that were not read.
        notes: what a person may want to know about such rows, for the report.
    """

    __slots__ = ("answered", "columns", "no_images", "notes", "read", "unread")

    def __init__(self, columns: Mapping[str, object], answered: bool, no_images: str | None = None) -> None:
        self.columns = columns
        self.answered = answered
        self.no_images = no_images
        self.read: set[str] = set()
        self.unread: set[str] = set()
        self.notes: set[str] = set()

    def take(self, column: str) -> object:
        """Read a column; None where the row does not have it."""
        value = self.columns.get(column)
        if value is not None:
            self.read.add(column)
        return value


def absent(value: object) -> bool:
    """Whether a data frame has filled a column or key that this row does not have."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def blank(value: object) -> bool:
    """Whether a value is an empty text, list or object."""
    return isinstance(value, str | list | tuple | Mapping) and not value


def text(value: object, where: str) -> str:
    """A text that has a UTF-8 form.

    Raises:
        BadRow: it is something else.
    """
    if not isinstance(value, str):
        raise BadRow(where, "is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(where, HALF_A_PAIR) from None
    return value


def filled(value: object, where: str) -> str:
    """A text with more than white space.

    Raises:
        BadRow: it is something else.
    """
    found = text(value, where)
    if not found or found.isspace():
        raise BadRow(where, "is empty")
    return found


def from_json(value: str, where: str, what: str) -> object:
    """The value of a JSON text.

    Args:
        value: the text.
        where: path of the value.
        what: it must be, for the problem's text.

    Raises:
        BadRow: it is not JSON.
    """
    try:
        found: object = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(where, f"is text, but not the JSON of {what} ({error})") from None
    return found


def plain(value: object, where: str, depth: int = 0) -> object:
    """A copy of a value that JSON has: objects, lists, texts, finite numbers, booleans and null.

    Raises:
        BadRow: it holds something else.
    """
    if isinstance(value, str):
        return text(value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > MOST_BITS:
            raise BadRow(where, f"is a number of {value.bit_length()} bits; expected at most {MOST_BITS}")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(where, f"is {value}, which JSON does not have")
        return value
    if depth == MOST_DEPTH:
        raise BadRow(where, f"has more than {MOST_DEPTH} lists and objects in each other")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadRow(where, f"has a key of type {type(key).__name__}; expected text")
            text(key, where)
        return {key: plain(each, where, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where, depth + 1) for each in value]
    raise BadRow(where, f"holds {type(value).__name__}, which JSON does not have")
