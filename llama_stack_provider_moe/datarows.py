"""Rows as people write them -> canonical rows, or the reasons why not. No torch: the server checks at the door.

Accepted for SFT (`instruct` and `dialog` are the API's `data_format`):

    instruct  {"prompt": str, "completion": str}
    instruct  {"chat_completion_input": [messages] | JSON text of it, "expected_answer": str}   (Llama Stack's own)
    dialog    {"messages": [messages]}
    dialog    {"dialog": [messages] | JSON text of it}

(where no answer is needed, `prompt` may stand alone, and messages may end with the user's),

and for DPO, where `prompt` is a string (instruct) or messages (dialog), and so are the answers:

    {"prompt": ..., "chosen": ..., "rejected": ...}

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. A string prompt becomes a user
turn and a string answer an assistant turn, so the model's chat template applies to every format alike.

Canonical, one JSON object a line in the job's folder:

    SFT  {"messages": [...]}                                  ends with an assistant turn, where one is needed
    DPO  {"prompt": [...], "chosen": [...], "rejected": [...]}   prompt ends with user or tool; answers are assistant's
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from llama_stack_provider_moe.errors import RowProblem, shorten
from llama_stack_provider_moe.spec import Recipe, RowFormat

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")

# The columns that make a format, and which `data_format` it is.
SFT_FORMATS: dict[tuple[str, ...], Literal["instruct", "dialog"]] = {
    ("messages",): "dialog",
    ("dialog",): "dialog",
    ("prompt", "completion"): "instruct",
    ("chat_completion_input", "expected_answer"): "instruct",
}
DPO_COLUMNS = ("prompt", "chosen", "rejected")


class _BadRow(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def canonical(
    row: Any, number: int, recipe: Recipe, row_format: RowFormat, answered: bool = True
) -> dict[str, list[Message]] | RowProblem:
    """The canonical form of one row, or its first problem.

    Args:
        row: as the host gave it. A data frame fills a column that this row lacks with NaN or None: both count
            as "not there".
        number: the row's number from 1, for the problem's text.
        recipe: `dpo` takes pairs, any other conversations.
        row_format: what the job says its rows are; a row of the other kind is a problem.
        answered: must a conversation end with the assistant's turn.
    """
    if not isinstance(row, Mapping):
        return RowProblem(number, "row", f"is {type(row).__name__}, not an object")
    present = {key: value for key, value in row.items() if not _absent(value)}
    try:
        return _dpo(present, row_format) if recipe == "dpo" else _sft(present, row_format, answered)
    except _BadRow as problem:
        return RowProblem(number, problem.field, problem.reason)


def _sft(row: dict[str, Any], row_format: RowFormat, answered: bool) -> dict[str, list[Message]]:
    found = [columns for columns in SFT_FORMATS if columns[0] in row]
    if not found:
        raise _BadRow("row", f"has columns {sorted(row)}; expected one of {_formats(row_format)}")
    if len(found) > 1:
        raise _BadRow("row", f"has both {found[0][0]!r} and {found[1][0]!r}; keep one format")
    columns = found[0]
    if row_format not in ("auto", SFT_FORMATS[columns]):
        raise _BadRow(columns[0], f"is a {SFT_FORMATS[columns]} row, but data_format is {row_format!r}")
    for column in columns[1:]:
        if column not in row and answered:
            raise _BadRow(column, f"is missing beside {columns[0]!r}")
    messages = _turns(row, columns[0], "user")
    if len(columns) == 2 and columns[1] in row:
        messages = messages + _turns(row, columns[1], "assistant")
    if answered and messages[-1]["role"] != "assistant":
        raise _BadRow(columns[-1], f"ends with a {messages[-1]['role']} turn; the last turn must be the assistant's")
    if messages[-1]["role"] == "system":
        raise _BadRow(columns[-1], "ends with a system turn, to which nothing is said")
    return {"messages": messages}


def _dpo(row: dict[str, Any], row_format: RowFormat) -> dict[str, list[Message]]:
    for column in DPO_COLUMNS:
        if column not in row:
            raise _BadRow(column, f"is missing; a preference row has {', '.join(DPO_COLUMNS)}")
        kind = "instruct" if isinstance(row[column], str) else "dialog"
        if column == "prompt" and row_format not in ("auto", kind):
            raise _BadRow(column, f"is of the {kind} format, but data_format is {row_format!r}")
    turns = {
        "prompt": _turns(row, "prompt", "user"),
        "chosen": _turns(row, "chosen", "assistant"),
        "rejected": _turns(row, "rejected", "assistant"),
    }
    if turns["prompt"][-1]["role"] not in ("user", "tool"):
        raise _BadRow("prompt", f"ends with a {turns['prompt'][-1]['role']} turn; expected the user's")
    for column in ("chosen", "rejected"):
        if turns[column][0]["role"] != "assistant":
            raise _BadRow(
                column, f"begins with a {turns[column][0]['role']} turn; give the answer alone, without the prompt"
            )
    if turns["chosen"] == turns["rejected"]:
        raise _BadRow("rejected", "is the same as chosen; there is nothing to prefer")
    return turns


def _turns(row: dict[str, Any], column: str, role_of_text: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str) and column in ("dialog", "chat_completion_input"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _BadRow(column, f"is text, but not the JSON of a list of messages ({error})") from None
    if isinstance(value, str) and column != "messages":
        if not value.strip():
            raise _BadRow(column, "is empty")
        return [{"role": role_of_text, "content": value}]
    if not isinstance(value, list):
        raise _BadRow(column, f"is {type(value).__name__}; expected text or a list of messages")
    if not value:
        raise _BadRow(column, "is an empty list")
    return [_message(item, f"{column}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise _BadRow(where, f"is {type(item).__name__}; expected an object with role and content")
    item = {key: value for key, value in item.items() if not _absent(value)}
    unknown = sorted(set(item) - {"role", "content"})
    if unknown:
        raise _BadRow(where, f"has unknown key(s) {', '.join(map(repr, unknown))}; a message has role and content")
    if item.get("role") not in ROLES:
        raise _BadRow(f"{where}.role", f"is {shorten(item.get('role'))}; expected one of {', '.join(ROLES)}")
    content = item.get("content")
    if not isinstance(content, str) or not content.strip():
        raise _BadRow(f"{where}.content", "is empty" if isinstance(content, str) else "is not text")
    return {"role": item["role"], "content": content}


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _formats(row_format: RowFormat) -> str:
    return ", ".join(
        "{" + ", ".join(columns) + "}" for columns, kind in SFT_FORMATS.items() if row_format in ("auto", kind)
    )
