"""A conversation as a prompt to generate from, and what graders read of its row."""

from collections.abc import Mapping
from typing import cast

from pydantic_core import to_jsonable_python

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.row_needs import CALLS, GOLD
from llama_stack_provider_moe.spec.rows.messages import Conversation, PromptRow
from llama_stack_provider_moe.spec.rows.values import BadRow


def prompt_of(found: Conversation, row: Mapping[str, object]) -> PromptRow:
    """Cut off the assistant's turn at a conversation's end: it becomes the row's `gold` answer.

    Args:
        found: the conversation, with or without an answer at its end.
        row: all its columns.

    Raises:
        BadRow: the row has a `gold` column beside an answer, or nothing stands before the answer.
    """
    item = cast(dict[str, object], to_jsonable_python(dict(row), fallback=str))
    if (answer := found["messages"][-1])["role"] == "assistant":
        calls = [dict(call["function"]) for call in answer.get("tool_calls", ())]
        for name, value in ((GOLD, answer["content"]), (CALLS, calls)):
            if not value:
                continue
            if name in item:
                raise BadRow(name, f"is {shorten(item[name])} beside an answer at the conversation's end, which takes "
                             "its place; leave one out")  # fmt: skip
            item[name] = value
    return cast(PromptRow, {**without_answer(found), "item": item})


def without_answer(found: Conversation) -> Conversation:
    """Cut off the assistant's turn at a conversation's end.

    Raises:
        BadRow: nothing to answer stands before it.
    """
    messages = found["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"] if messages else "nothing"
        raise BadRow("messages", f"has {last} before the answer; expected a prompt that ends with user or tool")
    return cast(Conversation, {**found, "messages": messages})
