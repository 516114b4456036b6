"""`RowsProfiler`: figures of a file of rows that need no tokenizer. Rows are read as a job reads them."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from typing import BinaryIO, cast

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.data_profile import Bucket, DataProfile, Lengths, Repeat, RowReason
from llama_stack_provider_moe.spec.row_domains import RowDomains
from llama_stack_provider_moe.spec.row_needs import RowNeeds
from llama_stack_provider_moe.spec.rows.columns import check_columns, check_found
from llama_stack_provider_moe.spec.rows.images import words_of
from llama_stack_provider_moe.spec.rows.messages import CanonicalRow, Message
from llama_stack_provider_moe.spec.rows.reading import canonical
from llama_stack_provider_moe.spec.rows.report import RowsReport
from llama_stack_provider_moe.spec.rows.values import HALF_A_PAIR

SHOWN = 20  # rows of each list


class Tally:
    """Collects the lengths of rows; four bytes a row."""

    def __init__(self) -> None:
        self._values = array("I")

    def add(self, length: int) -> None:
        """Count one row."""
        self._values.append(length)

    def lengths(self) -> Lengths | None:
        """The figures; None without a row. A bucket of the histogram ends below a power of two."""
        ordered = sorted(self._values)
        if not ordered:
            return None
        buckets: dict[int, int] = {}
        for value in ordered:
            bits = value.bit_length()
            buckets[bits] = buckets.get(bits, 0) + 1
        return Lengths(
            total=sum(ordered),
            smallest=ordered[0],
            median=ordered[(len(ordered) - 1) // 2],
            p95=ordered[-(-95 * len(ordered) // 100) - 1],
            largest=ordered[-1],
            histogram=[
                Bucket(least=(1 << bits) >> 1, most=(1 << bits) - 1, rows=rows) for bits, rows in buckets.items()
            ],
        )


class Reasons:
    """Rows with a reason: how many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[RowReason] = []

    def add(self, row: int, reason: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(RowReason(row=row, reason=reason))


class _Repeats:
    def __init__(self) -> None:
        self.count = 0
        self.shown: list[Repeat] = []

    def add(self, row: int, same_as: int) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(Repeat(row=row, same_as=same_as))


class RowsProfiler:
    """Reads rows one after the other; memory grows by some hundred bytes a row, to find repeated ones.

    Args:
        recipe: decides which fields a row needs.
        row_format: the format that the job states.
        columns: the data's names of columns by the formats' names.
        columns_field: the caller's name for `columns`, for error texts.
        domains: finds each row's domain in a column; None: there is no such column.
        answered: whether a conversation must end with the assistant's turn.
        needs: what graders read of each row; None: there are no graders.

    Raises:
        InvalidInput: `columns` names a column that the formats do not have.
    """

    def __init__(
        self,
        recipe: Recipe,
        row_format: RowFormat,
        columns: Mapping[str, str] | None,
        columns_field: str,
        domains: RowDomains | None = None,
        answered: bool = True,
        needs: RowNeeds | None = None,
    ) -> None:
        if columns:
            check_columns(columns, recipe, row_format, columns_field)
        self._reading = (recipe, row_format, columns)
        self._columns_field = columns_field
        self._domains = domains
        self._answered, self._needs = answered, needs
        self._held_out_domains: RowDomains | None = None
        self._report = RowsReport()
        self._rows = 0
        self._seen: set[str] = set()
        self._refused = Reasons()
        self._first: dict[bytes, int] = {}
        self._repeats = _Repeats()
        self._characters = Tally()
        self._held_out: int | None = None
        self._overlap = _Repeats()

    def add_all(self, rows: Iterable[object], valid: BinaryIO) -> None:
        """Count rows; write those that are valid to `valid`, as lines of JSON `[number, canonical row]`."""
        for row in rows:
            found = self.add(row)
            if found is not None:
                valid.write(json.dumps([self._rows, found]).encode() + b"\n")

    def add(self, row: object) -> CanonicalRow | None:
        """Count the next row; return its canonical form, or None if it is not valid."""
        self._rows += 1
        found, digest = self._canonical(row, self._rows, self._report, self._domains)
        if isinstance(found, RowProblem):
            self._refused.add(found.row, f"{found.field} {found.reason}")
            return None
        first = self._first.setdefault(digest, self._rows)
        if first != self._rows:
            self._repeats.add(self._rows, first)
        self._characters.add(_characters(found))
        return found

    def add_held_out(self, row: object) -> None:
        """Count a row of the held-out file, after all rows of the other; one that is not valid counts as refused."""
        self._held_out = (self._held_out or 0) + 1
        if self._domains is not None and self._held_out_domains is None:
            self._held_out_domains = self._domains.of_others()
        found, digest = self._canonical(row, self._held_out, None, self._held_out_domains)
        first = self._first.get(digest)
        if isinstance(found, RowProblem):
            self._refused.add(found.row, f"(held-out file) {found.field} {found.reason}")
        elif first is not None:
            self._overlap.add(self._held_out, first)

    def profile(self) -> DataProfile:
        """All figures.

        Raises:
            InvalidInput: `columns` names a column that no row has.
        """
        recipe, _, columns = self._reading
        if columns and self._rows:
            check_found(columns, self._seen, self._columns_field)
        notes = dict(self._report.notes)
        for domains in (self._domains, self._held_out_domains):
            if domains is not None and not self._refused.count:
                domains.require_enough()
        if self._domains is not None:
            notes |= {f"domain {name}": count for name, count in self._domains.counts.items()}
        return DataProfile(
            rows=self._rows,
            recipe=recipe,
            formats=self._report.formats,
            columns_read=self._report.read,
            columns_not_read=self._report.not_read,
            notes=notes,
            refused=self._refused.count,
            refused_rows=self._refused.shown,
            duplicates=self._repeats.count,
            duplicate_rows=self._repeats.shown,
            characters=self._characters.lengths(),
            held_out_rows=self._held_out,
            overlap=None if self._held_out is None else self._overlap.count,
            overlap_rows=self._overlap.shown,
        )

    def _canonical(
        self, given: object, number: int, report: RowsReport | None, domains: RowDomains | None
    ) -> tuple[CanonicalRow | RowProblem, bytes]:
        row = given
        if domains is not None:
            row, domain = domains.without(given), domains.add(given, number)
            if isinstance(domain, RowProblem):
                return domain, b""
        recipe, row_format, columns = self._reading
        if columns and isinstance(row, Mapping):
            self._seen.update(set(columns.values()).intersection(row))
        found = canonical(row, number, recipe, row_format, self._answered, columns, report, self._needs)
        if isinstance(found, RowProblem):
            return found, b""
        try:
            text = json.dumps(found, ensure_ascii=False, sort_keys=True).encode()
        except UnicodeEncodeError:
            return RowProblem(number, "row", HALF_A_PAIR), b""
        return found, hashlib.blake2b(text, digest_size=16).digest()


def _characters(row: CanonicalRow) -> int:
    columns = cast("Mapping[str, object]", row)
    if "text" in columns:
        return len(str(columns["text"]))
    lists = [columns[key] for key in ("messages", "prompt", "completion", "chosen", "rejected") if key in columns]
    return sum(
        len(words_of(message["content"])) + len(message.get("reasoning", ""))
        for messages in cast("list[list[Message]]", lists)
        for message in messages
    )
