"""One row as people write it -> its canonical form, or its first problem. Without torch: the server checks rows too.

The columns decide the format (`formats`), unless the job names it. A row that two formats could read is a problem,
unless both say the same. A column that would change the meaning and that the format does not read is a problem too;
every other column that is not read is counted in the report.
"""

from collections.abc import Mapping
from typing import Final, cast

from llama_stack_provider_moe.errors import RowProblem, shorten
from llama_stack_provider_moe.spec import Recipe, RowFormat
from llama_stack_provider_moe.spec.recipes import no_images
from llama_stack_provider_moe.spec.row_needs import RowNeeds
from llama_stack_provider_moe.spec.row_sources import DOWN, PAIRED, UP
from llama_stack_provider_moe.spec.rows.formats import CHATS, PREFERENCES, Columns
from llama_stack_provider_moe.spec.rows.messages import CanonicalRow, Conversation, PromptRow
from llama_stack_provider_moe.spec.rows.prompts import prompt_of, without_answer
from llama_stack_provider_moe.spec.rows.recognition import read
from llama_stack_provider_moe.spec.rows.report import RowsReport
from llama_stack_provider_moe.spec.rows.thumbs import label_of, thumb_row
from llama_stack_provider_moe.spec.rows.values import BadRow, Source, absent, blank

_MEDIA = "jobs train on text and images; remove the column, if the texts are complete without it"
_IMAGES = (
    "an image stands in a user message, as a part of type image or image_url; remove the column, if the texts are "
    "complete without it"
)
_ELSEWHERE = "name it system with data.columns, or put its text into a message of role system"
# Columns that would change what a row means, and what to do where the row's format does not read them.
MEANT: Final[Mapping[str, str]] = {
    "tools": "give messages, whose chat template shows the tools to the model, or remove the column",
    "functions": "name it tools with data.columns",
    "parallel_tool_calls": "remove the column",
    "chat_template_kwargs": "remove the column",
    "system": "remove the column, or put its text into the text",
    "system_prompt": _ELSEWHERE,
    "system_message": _ELSEWHERE,
    "history": "give the earlier turns as messages",
    "input": "only rows with instruction have an input; put its text into the prompt, or name the column with "
    "data.columns",
    "context": "put its text into the prompt, or name it input with data.columns where the rows have an instruction",
    "weight": "rows have no weight; give the assistant's messages weight 0 or 1",
    "weights": "rows have no weights; give the assistant's messages weight 0 or 1",
    "label": "it may say which answers are bad, and each row would be learnt; use recipe kto, or keep the good rows "
    "and remove the column",
    "labels": "the job makes labels itself; remove the column",
    **dict.fromkeys(("image", "images"), _IMAGES),
    **dict.fromkeys(("audio", "audios", "video", "videos"), _MEDIA),
}

_OF_ANSWERS = ("label",)  # columns about a row's answer, for recipes that leave it out
# Recipes that use every token of a row, so that a plain text will do.
_WITH_TEXTS = ("sft", "surgery")


def canonical(
    row: object,
    number: int,
    recipe: Recipe,
    row_format: RowFormat,
    answered: bool = True,
    columns: Mapping[str, str] | None = None,
    report: RowsReport | None = None,
    needs: RowNeeds | None = None,
    kind: str | None = None,
) -> CanonicalRow | RowProblem:
    """The canonical form of one row, or its first problem.

    Args:
        row: as the host gave it. A data frame fills a column that this row does not have with NaN or None: both count
            as missing.
        number: the row's number from 1, for the problem's text.
        recipe: `dpo` and `reward` take preferences, `sft` and `surgery` conversations and texts, every other recipe
            conversations, of which `grpo` keeps all columns, `distill` only the prompt, and `kto` needs a label.
        row_format: the format that the job states; a row of another format is a problem.
        answered: whether a conversation must end with the assistant's turn.
        columns: the data's name of a column by the format's name.
        report: counts the row, unless it has a problem.
        needs: what graders read of a prompt's row.
        kind: what reads the rows if it is not the recipe, for errors; it takes no images.
    """
    if not isinstance(row, Mapping):
        return RowProblem(number, "row", f"is {type(row).__name__}, not an object")
    renamed = columns or {}
    table = PREFERENCES if recipe in PAIRED else CHATS
    why = no_images(recipe) if kind is None else f"{kind} takes text only"
    try:
        present, shadowed = _present(row, renamed)
        label, labels = label_of(present) if recipe == "kto" else (None, set[str]())
        unlabelled = {column: value for column, value in present.items() if column not in labels}
        name, found, source = read(unlabelled, table, row_format, answered, recipe in _WITH_TEXTS, why)
        if "text" in found and recipe not in _WITH_TEXTS:
            raise BadRow(
                "text", f"is a row of plain text, which has no answer; expected a conversation with recipe {recipe!r}"
            )
        if recipe == "grpo":  # what the prompt does not read, graders may
            prompt, not_read = prompt_of(cast(Conversation, found), present), _for_graders(present, source)
            lacks = None if needs is None else needs.problem(prompt["item"], number)
            if lacks is not None:
                return lacks._replace(field=_by_its_own_name(lacks.field, renamed))
            if needs is not None and (note := needs.note(prompt["item"])) is not None:
                source.notes.add(note)
            found = prompt
        elif recipe == "distill":
            found = cast(PromptRow, {**without_answer(cast(Conversation, found)), "item": {}})
            not_read = _not_read(present, shadowed, source, name, _OF_ANSWERS)
        else:
            if label is not None:
                found = thumb_row(cast(Conversation, found), label)
                source.read |= labels
                source.notes.add(UP if label else DOWN)
            not_read = _not_read(present, shadowed, source, name)
    except BadRow as problem:
        return RowProblem(number, _by_its_own_name(problem.field, renamed), problem.reason)
    if report is not None:
        names = [renamed.get(column, column) for column in source.read]
        report.add(name, names, [*not_read, *source.unread], source.notes)
    return found


def conversation(
    row: object,
    number: int,
    row_format: RowFormat,
    answered: bool = True,
    columns: Mapping[str, str] | None = None,
    report: RowsReport | None = None,
) -> Conversation | RowProblem:
    """As `canonical`, for what takes only conversations of text: evaluations and analyses."""
    kind = "an evaluation or analysis"
    found = canonical(row, number, "routing_analysis", row_format, answered, columns, report, kind=kind)
    return found if isinstance(found, RowProblem) else cast(Conversation, found)


def _present(row: Mapping[object, object], columns: Mapping[str, str]) -> tuple[dict[str, object], dict[str, object]]:
    """The row's columns by the formats' names, and those whose name another column got."""
    present: dict[str, object] = {}
    for key, value in row.items():
        if not isinstance(key, str):
            raise BadRow("row", f"has a column named {shorten(key)}; expected text")
        if not absent(value):
            present[key] = value
    if not columns:
        return present, {}
    given = {ours: present[theirs] for ours, theirs in columns.items() if theirs in present}
    taken = set(columns.values())
    rest = {key: value for key, value in present.items() if key not in taken}
    shadowed = {key: rest.pop(key) for key in columns if key in rest}
    return rest | given, shadowed


def _by_its_own_name(field: str, columns: Mapping[str, str]) -> str:
    for ours, theirs in columns.items():
        if field == ours or field.startswith((f"{ours}[", f"{ours}.", f"{ours},")):
            return theirs + field[len(ours) :]
    return field


def _not_read(
    row: Columns, shadowed: Columns, source: Source, name: str, without_effect: tuple[str, ...] = ()
) -> list[str]:
    found = [(column, value) for column, value in row.items() if column not in source.read] + [*shadowed.items()]
    for column, value in found:
        advice = MEANT.get(column)
        if advice is not None and column not in without_effect and not _says_nothing(column, value):
            raise BadRow(column, f"would change the meaning, but {name} rows have no such column; {advice}")
    return [column for column, _ in found]


def _for_graders(row: Columns, source: Source) -> list[str]:
    found = {column: value for column, value in row.items() if column not in source.read}
    for column, value in found.items():
        if MEANT.get(column) in (_MEDIA, _IMAGES) and not _says_nothing(column, value):
            raise BadRow(column, f"would change the meaning; {MEANT[column]}")
    return []


def _says_nothing(column: str, value: object) -> bool:
    if column == "weight" and isinstance(value, int | float):
        return value == 1 and value is not True
    return blank(value)
