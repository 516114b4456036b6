"""Which format a row has: its columns decide, unless the job names one.

Where several formats fit, the row must say the same in all of them: a data set may keep a conversation's first prompt
in a column of its own, or the text that its authors made of the other columns.
"""

from collections.abc import Sequence
from typing import Final, cast

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec import RowFormat
from llama_stack_provider_moe.spec.rows.formats import ANSWERS, CHATS, PREFERENCES, Columns, Format
from llama_stack_provider_moe.spec.rows.images import Content, words_of
from llama_stack_provider_moe.spec.rows.messages import CanonicalRow, Conversation, Message, TextRow
from llama_stack_provider_moe.spec.rows.values import BadRow, Source

ANY_FORMAT: Final = ("auto", "instruct", "dialog")


def read(
    row: Columns,
    table: Sequence[Format],
    row_format: RowFormat,
    answered: bool,
    texts: bool,
    no_images: str | None = None,
) -> tuple[str, CanonicalRow, Source]:
    """The name of a row's format, its canonical form, and what was read of it.

    Args:
        row: its columns.
        table: the formats of the recipe.
        row_format: as the job states it.
        answered: whether a conversation must end with the assistant's turn.
        texts: whether the recipe takes rows of plain text.
        no_images: why the recipe takes no images; None: it takes them.

    Raises:
        BadRow: no format fits, several fit that differ, or the row has a problem.
    """
    fitting = [each for each in table if each.fits(row) and (each.auto or row_format in each.names)]
    if row_format in ("instruct", "dialog"):
        fitting = _of_kind(row, fitting, row_format)
    elif row_format != "auto":
        fitting = [each for each in fitting if row_format in each.names]
    if not fitting:
        raise _of_no_format(row, table, row_format, answered, texts)
    if len(fitting) > 1:
        return _only_meaning(row, fitting, answered, no_images)
    source = Source(row, answered, no_images)
    return fitting[0].names[0], fitting[0].read(source), source


def _of_kind(row: Columns, fitting: Sequence[Format], kind: RowFormat) -> list[Format]:
    found = [each for each in fitting if kind in each.kinds_in(row)]
    if fitting and not found:
        other = fitting[0].kinds_in(row)[0]
        where = next(column for column in fitting[0].columns if column in row)
        raise BadRow(where, f"is {'an' if other == 'instruct' else 'a'} {other} row, but data_format is {kind!r}")
    return found


def _only_meaning(
    row: Columns, fitting: Sequence[Format], answered: bool, no_images: str | None
) -> tuple[str, CanonicalRow, Source]:
    """The first format whose row says all that the other formats' do, such as messages beside their own prompt.

    Raises:
        BadRow: there is none.
    """
    problems: list[BadRow] = []
    for main in fitting:
        source = Source(row, answered, no_images)
        try:
            found = main.read(source)
        except BadRow as problem:
            problems.append(problem)
            continue
        if all(_says(found, row, other, source) for other in fitting if other is not main):
            return main.names[0], found, source
    if len(problems) == len(fitting):
        raise problems[0]
    first, second = fitting[0], fitting[1]
    raise BadRow(
        "row",
        f"is ambiguous: {first.columns[0]!r} makes it a row of format {first.names[0]}, {second.columns[0]!r} one of "
        f"{second.names[0]}, and they differ; choose with data.format, or leave one out",
    )


def _says(found: CanonicalRow, row: Columns, other: Format, source: Source) -> bool:
    """Whether `found` says all that the other format reads; the columns that it reads then count as read."""
    again = Source(row, answered=False)
    try:
        repeated = other.read(again)
    except BadRow:
        return False
    if not _contains(found, repeated):
        return False
    source.read |= again.read
    return True


def _contains(found: CanonicalRow, repeated: CanonicalRow) -> bool:
    if "messages" not in found:
        return found == repeated
    said = cast(Conversation, found)["messages"]
    if "text" in repeated:
        whole = cast(TextRow, repeated)["text"]
        return all(line.strip() in whole for each in said for line in words_of(each["content"]).splitlines())
    bare = [_bare(each) for each in said]
    return all(_bare(each) in bare for each in cast(Conversation, repeated)["messages"])


def _bare(message: Message) -> tuple[str, Content, object]:
    return message["role"], message["content"], message.get("tool_calls")


def _of_no_format(row: Columns, table: Sequence[Format], row_format: RowFormat, answered: bool, texts: bool) -> BadRow:
    if table is PREFERENCES and row_format in (*ANY_FORMAT, "preference"):
        missing = "rejected" if "chosen" in row else "chosen"
        return BadRow(missing, "is missing; a preference row has prompt, chosen, rejected")
    named = [each for each in table if row_format in each.names]
    if row_format in ANY_FORMAT:
        named = [each for each in table if each.auto and (row_format == "auto" or row_format in each.usual)]
        named = [each for each in named if texts or "text" not in each.names]
    if not named:
        recipe = "dpo" if table is CHATS else "sft"
        return BadRow("row", f"can't be of data.format {row_format!r}, which is for recipe {recipe}")
    answers = ANSWERS if table is CHATS and not answered else ()
    shown = dict.fromkeys(", ".join(c for c in each.columns if c not in (*each.optional, *answers)) for each in named)
    hint = f"; an answer ({' or '.join(answers)}) may be left out" if answers else ""
    hint += "; data.columns gives columns other names"
    if table is CHATS and "chosen" in row:
        hint = "; chosen and rejected are for recipes dpo and reward"
    expected = ", ".join(f"{{{columns}}}" for columns in shown)
    return BadRow("row", f"has columns {shorten(sorted(row), 400)}; expected one of {expected}{hint}")
