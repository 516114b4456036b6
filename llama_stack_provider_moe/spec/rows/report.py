"""`RowsReport`: how many rows had which format, and which of their columns were read and which were not."""

from collections.abc import Iterable, Mapping
from typing import Final, cast

MOST_NAMES: Final = 200  # of columns: the names of later ones are not kept, only their number
OTHERS: Final = "(other columns)"
NAME_LENGTH: Final = 100  # characters
_SHOWN = 12
_PARTS = ("formats", "read", "not_read", "notes")


class RowsReport:
    """Counts of rows, by format, column and note; its size does not grow with the rows.

    Attributes:
        rows: number of rows.
        formats: rows of each format.
        read: rows in which a column was read, by the data's name for it.
        not_read: rows that have a column, or a key inside one such as `messages[].id`, that was not read.
        notes: rows with what a person may want to know, such as reasoning.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.formats: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.not_read: dict[str, int] = {}
        self.notes: dict[str, int] = {}

    def add(self, name: str, read: Iterable[str], not_read: Iterable[str], notes: Iterable[str]) -> None:
        """Count one row.

        Args:
            name: of the row's format.
            read: the columns that were read.
            not_read: the columns that were not.
            notes: what a person may want to know about it.
        """
        self.rows += 1
        self.formats[name] = self.formats.get(name, 0) + 1
        for column in read:
            _count(self.read, column, 1)
        for column in not_read:
            _count(self.not_read, column, 1)
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + 1

    def merge(self, other: "RowsReport") -> None:
        """Add the counts of another report."""
        self.rows += other.rows
        for part in _PARTS:
            mine = getattr(self, part)
            for name, count in getattr(other, part).items():
                _count(mine, name, count)

    def as_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        return {"rows": self.rows, **{part: dict(getattr(self, part)) for part in _PARTS}}

    @classmethod
    def from_json(cls, found: object) -> "RowsReport":
        """The report that `as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(found, Mapping) or not _is_count(found.get("rows")):
            raise ValueError("a report of rows is an object with the number of rows")
        report = cls()
        report.rows = found["rows"]
        for part in _PARTS:
            counts = found.get(part, {})
            if not isinstance(counts, Mapping) or not all(map(_is_count, counts.values())):
                raise ValueError(f"{part} of a report of rows is an object of counts")
            getattr(report, part).update(cast(Mapping[str, int], counts))
        return report

    def lines(self) -> list[str]:
        """The report for a person: formats, columns that were not read, notes."""
        lines = [f"{self.rows:,} rows: {_counted(self.formats, self.rows)}"]
        lines += self.unread()
        if self.notes:
            lines.append(f"with {_counted(self.notes, self.rows)}")
        return lines

    def unread(self) -> list[str]:
        """The columns that were not read, for a person: a line, or none."""
        return [f"columns not read: {_counted(self.not_read, self.rows)}"] if self.not_read else []


def _count(counts: dict[str, int], name: str, by: int) -> None:
    if name in counts:
        counts[name] += by
        return
    known = name[:NAME_LENGTH] if len(counts) < MOST_NAMES else OTHERS
    counts[known] = counts.get(known, 0) + by


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counted(counts: Mapping[str, int], rows: int) -> str:
    """`a, b (3)`: the most frequent names first; no number beside those that every row has."""
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    named = [name if counts[name] == rows else f"{name} ({counts[name]:,})" for name in ordered[:_SHOWN]]
    more = len(ordered) - _SHOWN
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")
