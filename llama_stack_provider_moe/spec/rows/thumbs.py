"""A conversation with a thumb up or down on its last answer, for KTO."""

from collections.abc import Mapping
from typing import Final, cast

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.messages import Conversation, ThumbRow
from llama_stack_provider_moe.spec.rows.values import BadRow

LABEL: Final = "label"
# Common names of the column; the first is the format's, which `data.columns` may rename.
LABELS: Final = (LABEL, "desirable", "kto_tag", "thumbs_up")
_TRUE: Final = ("true", "1", "desirable", "thumbs_up", "up")
_FALSE: Final = ("false", "0", "undesirable", "thumbs_down", "down")


def label_of(row: Mapping[str, object]) -> tuple[bool, set[str]]:
    """Whether a row's answer is desirable, and the columns that say so.

    Raises:
        BadRow: no column says so, one holds something else, or two differ.
    """
    found = {column: _truth(row[column], column) for column in LABELS if column in row}
    if not found:
        raise BadRow(LABEL, f"is missing; expected true (thumb up) or false (thumb down), in a column {LABEL}, or "
                     f"{', '.join(LABELS[1:])}")  # fmt: skip
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise BadRow(other, f"is {shorten(row[other])}, but {first} is {shorten(row[first])}; leave one out")
    return found[first], {*found}


def thumb_row(found: Conversation, label: bool) -> ThumbRow:
    """A conversation as prompt and answer: all that follows the last user's turn.

    Raises:
        BadRow: there is no user's turn before the answer, or a message of the answer has weight 0.
    """
    messages = found["messages"]
    asked = [index for index, each in enumerate(messages) if each["role"] == "user"]
    if not asked:
        raise BadRow("messages", "has no user's turn before the answer")
    prompt, answer = messages[: asked[-1] + 1], messages[asked[-1] + 1 :]
    if any(each.get("weight") == 0 for each in answer):
        raise BadRow("messages", "has a message of weight 0 in its answer; the label is for the whole answer")
    beside = {name: value for name, value in found.items() if name != "messages"}
    return cast(ThumbRow, {"prompt": prompt, "completion": answer, "label": label, **beside})


def _truth(value: object, column: str) -> bool:
    said = str(value).strip().casefold() if isinstance(value, bool | int | str) else ""
    if said in _TRUE:
        return True
    if said in _FALSE:
        return False
    raise BadRow(column, f"is {shorten(value)}; expected true (thumb up) or false (thumb down)")
