"""`RowSource`: one data set of a job, as the service copies it into the job's folder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama_stack_provider_moe.spec.blocks import RowFormat

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec.row_needs import RowNeeds

UP, DOWN = "a thumb up", "a thumb down"  # what reports of rows call the classes of KTO
THUMBS = (UP, DOWN)
PAIRED = ("dpo", "reward")  # the recipes whose rows are pairs of answers
# recipe: rows that the recipe trains on; the other kinds are for an evaluation (`spec.evaluation_rows`).
RowKind = Literal["recipe", "conversation", "scenario", "judged"]


class DomainColumn(NamedTuple):
    """How a data set's rows name their domains.

    Attributes:
        column: of the rows.
        field: dotted name of the setting that names it.
        values: those that rows may have; None: any, at most `MOST_DOMAINS`.
        least: minimum number of rows of each domain.
        rows: what the rows are, for errors.
    """

    column: str
    field: str
    values: tuple[str, ...] | None
    least: int
    rows: str = "training"


class RowSource(NamedTuple):
    """One data set of a job.

    Attributes:
        field: dotted name of the setting that names it.
        dataset_id: as the job names it (`control.server.own_datasets`).
        format: of its rows, as the job states it.
        part: name of its rows in the job's folder (`JobFolder.rows`).
        least: minimum number of rows.
        why_least: the minimum and its reason, for the text of an error.
        answered: whether each row must end with the assistant's turn.
        kind: of its rows.
        columns: the data's names of columns by the formats' names (`data.columns`).
        domains: the column that names each row's domain (`data.domain_column`).
        needs: what graders read of each row; None: there are no graders.
        least_of_class: minimum number of rows of each of `classes`; 0: rows have none.
        classes: of rows, as reports of rows call them.
    """

    field: str
    dataset_id: str
    format: RowFormat
    part: str
    least: int = 1
    why_least: str = ""
    answered: bool = True
    kind: RowKind = "recipe"
    columns: Mapping[str, str] | None = None
    domains: DomainColumn | None = None
    needs: "RowNeeds | None" = None
    least_of_class: int = 0
    classes: tuple[str, ...] = THUMBS

    def shortage(self, rows: int, notes: Mapping[str, int]) -> str | None:
        """What the data set lacks, for the text of an error; None: nothing.

        Args:
            rows: number of its rows.
            notes: of its report (`RowsReport.notes`).
        """
        if rows < self.least:
            return f"{self.why_least}; it has {rows:,}"
        if self.least_of_class:
            for kind in self.classes:
                if (found := notes.get(kind, 0)) < self.least_of_class:
                    held_out = ", because one is held out" if self.least_of_class > 1 else ""
                    return f"at least {self.least_of_class} row(s) with {kind}{held_out}; it has {found:,} of {rows:,}"
        return None

    @property
    def columns_field(self) -> str:
        """Dotted name of the setting with `columns`."""
        return f"{self.field.rpartition('.')[0]}.columns"
