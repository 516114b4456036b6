"""`data.domain_column`: the domain of each row, from a column of the rows, as they are read one after the other."""

import re
from collections.abc import Iterable, Mapping

from llama_stack_provider_moe.errors import InvalidInput, RowProblem, shorten
from llama_stack_provider_moe.spec.data import DOMAIN_PATTERN, MOST_DOMAINS
from llama_stack_provider_moe.spec.row_sources import DomainColumn
from llama_stack_provider_moe.spec.rows.values import absent

_NAMES = "1 to 32 letters, digits, '_' and '-', the first a letter or a digit"


class RowDomains:
    """Finds the domain of one row after the other, and counts them.

    Args:
        how: the column.
        values: the domains that rows may have, in order; None: any.
    """

    def __init__(self, how: DomainColumn, values: Iterable[str] | None = None) -> None:
        self._how = how
        self._known = None if values is None else tuple(values)
        self._numbers = {value: number for number, value in enumerate(self._known or ())}
        self.counts = dict.fromkeys(self._known or (), 0)

    @property
    def values(self) -> tuple[str, ...]:
        """The domains, in the order of their numbers."""
        return tuple(self._numbers)

    def of_others(self) -> "RowDomains":
        """Finds the domains of held-out rows, which have to be among these."""
        return RowDomains(self._how._replace(least=1, rows="held-out"), self.values)

    def without(self, row: object) -> object:
        """The row without the column, which no format reads."""
        if isinstance(row, Mapping) and self._how.column in row:
            return {key: value for key, value in row.items() if key != self._how.column}
        return row

    def add(self, row: object, number: int) -> int | RowProblem:
        """Count a row; return the number of its domain, or what is wrong with it.

        Args:
            row: as its source has it.
            number: of the row, from 1.
        """
        column = self._how.column
        given = row.get(column) if isinstance(row, Mapping) else None
        if absent(given):
            return RowProblem(number, column, "is missing; data.domain_column needs it in every row")
        value = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
        if not isinstance(value, str) or not re.fullmatch(DOMAIN_PATTERN, value):
            return RowProblem(number, column, f"is {shorten(given)}; a domain's name has {_NAMES}")
        if value not in self._numbers:
            if (problem := self._why_not(value)) is not None:
                return RowProblem(number, column, problem)
            self._numbers[value] = len(self._numbers)
        self.counts[value] = self.counts.get(value, 0) + 1
        return self._numbers[value]

    def _why_not(self, value: str) -> str | None:
        if self._known is not None:
            return f"is {value!r}; expected {', '.join(map(repr, self._known))}"
        # Names are also file names, and some file systems do not tell `Code` from `code`.
        same = [other for other in self._numbers if other.casefold() == value.casefold()]
        if same:
            return f"is {value!r}, and another row has {same[0]!r}; expected one spelling"
        if len(self._numbers) == MOST_DOMAINS:
            return f"is {value!r}, a domain more than the {MOST_DOMAINS} that are possible"
        return None

    def require_enough(self) -> None:
        """Check, after all rows, that there are two domains and that each has enough rows.

        Raises:
            InvalidInput: there are fewer domains, or one of them has too few rows.
        """
        how = self._how
        if len(self._numbers) < 2:
            raise InvalidInput(how.field, how.column, "a column of two or more values; each row has "
                               f"{shorten(next(iter(self._numbers), ''))}")  # fmt: skip
        for value, count in self.counts.items():
            if count < how.least:
                held_out = ", because one is held out" if how.least > 1 else ""
                raise InvalidInput(how.field, how.column, f"at least {how.least} {how.rows} row(s) of each domain"
                                   f"{held_out}; {value!r} has {count}")  # fmt: skip
