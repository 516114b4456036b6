"""`data.columns`: other names of the columns that formats read."""

from collections.abc import Collection, Mapping

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.row_sources import PAIRED
from llama_stack_provider_moe.spec.rows.formats import CHATS, PREFERENCES
from llama_stack_provider_moe.spec.rows.thumbs import LABEL


def format_columns(recipe: Recipe, row_format: RowFormat) -> list[str]:
    """The columns that rows of a recipe may have, by the formats' names for them."""
    table = PREFERENCES if recipe in PAIRED else CHATS
    any_format = row_format in ("auto", "instruct", "dialog")
    fitting = [each for each in table if any_format or row_format in each.names]
    labels = [LABEL] if recipe == "kto" else []
    return list(dict.fromkeys([*labels, *(column for each in fitting for column in (*each.columns, *each.beside))]))


def check_columns(columns: Mapping[str, str], recipe: Recipe, row_format: RowFormat, field: str) -> None:
    """Check that a job names columns that its rows' formats have.

    Args:
        columns: the data's name of a column by the format's name.
        recipe: of the job.
        row_format: the format that the job states.
        field: the caller's name for the setting.

    Raises:
        InvalidInput: a format has no such column, or two columns get the same name.
    """
    known = format_columns(recipe, row_format)
    for ours, theirs in columns.items():
        if ours not in known:
            raise InvalidInput(field, ours, f"a column of the formats of recipe {recipe!r}: {', '.join(known)}")
        others = [each for each in columns if columns[each] == theirs]
        if len(others) > 1:
            raise InvalidInput(f"{field}.{others[1]}", theirs, f"a column other than that of {others[0]}")


def check_found(columns: Mapping[str, str], seen: Collection[str], field: str) -> None:
    """Check that at least one row has each column that a job names.

    Raises:
        InvalidInput: no row has it.
    """
    for ours, theirs in columns.items():
        if theirs not in seen:
            there = ", ".join(sorted(seen)[:20]) or "none"
            raise InvalidInput(f"{field}.{ours}", theirs, f"a column of the data set, whose columns are: {there}")
