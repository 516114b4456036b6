"""`RowSource`: one data set of a job, as the service copies it into the job's folder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama_stack_provider_moe.spec.blocks import RowFormat

if TYPE_CHECKING:
    from llama_stack_provider_moe.spec.row_needs import RowNeeds

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

    @property
    def columns_field(self) -> str:
        """Dotted name of the setting with `columns`."""
        return f"{self.field.rpartition('.')[0]}.columns"
