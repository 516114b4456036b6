"""What became of a data set's rows: counts, and the numbers of the first rows that were left out or refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter

SHOWN = 20


@dataclass
class Named:
    """Rows with one reason: how many, and the numbers of the first `SHOWN` of them, from 1."""

    count: int = 0
    rows: list[int] = field(default_factory=list)


@dataclass
class Reasons:
    """Rows by reason. Beyond the first `SHOWN` reasons, rows are only counted."""

    count: int = 0
    named: dict[str, Named] = field(default_factory=dict)

    def add(self, reason: str, row: int) -> None:
        """Count one more row."""
        self.merge(Reasons(1, {reason: Named(1, [row])}))

    def merge(self, later: "Reasons") -> None:
        """Add the counts of rows that come after these."""
        self.count += later.count
        for reason, other in later.named.items():
            if reason in self.named or len(self.named) < SHOWN:
                mine = self.named.setdefault(reason, Named())
                mine.count += other.count
                mine.rows = (mine.rows + other.rows)[:SHOWN]

    def text(self) -> str:
        """The first `SHOWN` rows by reason."""
        described, shown = [], 0
        for reason, each in self.named.items():
            part = each.rows[: SHOWN - shown]
            shown += len(part)
            if part:
                described.append(f"row{'s' if len(part) > 1 else ''} {', '.join(map(str, part))}: {reason}")
        more = f"; and {self.count - shown} more" if self.count > shown else ""
        return f"{'; '.join(described)}{more}"


@dataclass
class RowCounts:
    """Counts of one data set, or of a part of it.

    Attributes:
        source: rows of the file.
        encoded: rows for the trainer; one source row may give several.
        cut: source rows that were cut.
        system_cut: those among them that begin with a system message, which was cut too.
        texts: source rows of plain text, without a chat template.
        dropped: source rows that were left out.
        refused: source rows that can't be trained on; they end the job.
        rendering: the renderer's own counts.
    """

    source: int = 0
    encoded: int = 0
    cut: int = 0
    system_cut: int = 0
    texts: int = 0
    dropped: Reasons = field(default_factory=Reasons)
    refused: Reasons = field(default_factory=Reasons)
    rendering: dict[str, int] = field(default_factory=dict)

    def merge(self, later: "RowCounts") -> None:
        """Add the counts of rows that come after these."""
        self.source += later.source
        self.encoded += later.encoded
        self.cut += later.cut
        self.system_cut += later.system_cut
        self.texts += later.texts
        self.dropped.merge(later.dropped)
        self.refused.merge(later.refused)
        add_counts(self.rendering, later.rendering)

    def as_json(self) -> dict[str, object]:
        """The counts as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: object) -> "RowCounts":
        """Read what `as_json` gave.

        Raises:
            ValueError: it is something else.
        """
        return _JSON.validate_python(found)


_JSON: TypeAdapter[RowCounts] = TypeAdapter(RowCounts)


def add_counts(mine: dict[str, int], others: Mapping[str, int]) -> None:
    """Add counts by name."""
    for name, count in others.items():
        mine[name] = mine.get(name, 0) + count
