"""`RowSource`: one data set of a job, as the service copies it into the job's folder."""

from typing import Literal, NamedTuple

from llama_stack_provider_moe.spec.blocks import RowFormat

# recipe: what the recipe trains on; the others are an evaluation's (`spec.evaluation_rows`).
RowKind = Literal["recipe", "conversation", "scenario", "judged"]


class RowSource(NamedTuple):
    """One data set of a job.

    Attributes:
        field: dotted name of the setting that names it.
        dataset_id: its name with the host.
        format: what its rows are said to be.
        part: name of its rows in the job's folder (`JobFolder.rows`).
        least: rows it must have.
        why_least: the same, for an error's text.
        answered: must each end with the assistant's turn.
        kind: of its rows.
    """

    field: str
    dataset_id: str
    format: RowFormat
    part: str
    least: int = 1
    why_least: str = ""
    answered: bool = True
    kind: RowKind = "recipe"
