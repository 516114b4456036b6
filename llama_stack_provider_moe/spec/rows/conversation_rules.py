"""What a person can't mean: calls and results that don't belong together, conversations that end in the wrong place."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.messages import Message, ToolCall
from llama_stack_provider_moe.spec.rows.values import BadRow

NO_CALL: Final = (
    "is a tool's result, but no call without a result is before it; a call is in tool_calls, a function_call, or the "
    'text before the result as <tool_call>{"name": ..., "arguments": {...}}</tool_call>; no other text, such as '
    "[name(argument=1)], is read as a call"
)


class Part(NamedTuple):
    """The messages that one column gave."""

    column: str
    messages: list[Message]
    listed: bool = True  # whether the column holds a list of them; else its path names each
    numbers: Sequence[int] | None = None  # index of each in the column's list; None: in its order, from 0

    def behind(self, count: int) -> "Part":
        """All but the first `count` messages."""
        numbers = range(len(self.messages)) if self.numbers is None else self.numbers
        return self._replace(messages=self.messages[count:], numbers=numbers[count:])


def joined(parts: Sequence[Part]) -> list[Message]:
    """The messages of all parts."""
    return parts[0].messages if len(parts) == 1 else [message for part in parts for message in part.messages]


def path(parts: Sequence[Part], index: int) -> str:
    """The path in the row of the message with this index in the whole conversation."""
    for part in parts:
        if index < len(part.messages):
            number = index if part.numbers is None else part.numbers[index]
            return f"{part.column}[{number}]" if part.listed else part.column
        index -= len(part.messages)
    raise IndexError(index)


def check_calls(parts: Sequence[Part]) -> None:
    """Check that each result has its call before it, and each call its result, unless the conversation ends with it.

    Raises:
        BadRow: one has not.
    """
    open_calls: list[ToolCall] = []
    caller = 0
    said = joined(parts)
    for index, message in enumerate(said):
        if message["role"] == "tool":
            open_calls.remove(_call_of(message, open_calls, path(parts, index)))
            continue
        if open_calls:
            raise BadRow(f"{path(parts, caller)}.tool_calls", _without_result(open_calls, path(parts, index)))
        if "tool_calls" in message:
            open_calls, caller = list(message["tool_calls"]), index
    if open_calls and said[-1]["role"] == "tool":
        raise BadRow(f"{path(parts, caller)}.tool_calls", _without_result(open_calls, "the conversation's end"))


def _call_of(message: Message, open_calls: Sequence[ToolCall], where: str) -> ToolCall:
    if not open_calls:
        raise BadRow(where, NO_CALL)
    number, name = message.get("tool_call_id"), message.get("name")
    numbered = [call["id"] for call in open_calls if "id" in call]
    if number is not None and numbered:
        found = next((call for call in open_calls if call.get("id") == number), None)
        if found is None:
            raise BadRow(f"{where}.tool_call_id", f"is {shorten(number)}; expected the id of a call before it: "
                         f"{shorten(numbered)}")  # fmt: skip
        return found
    if name is None:
        return open_calls[0]
    found = next((call for call in open_calls if call["function"]["name"] == name), None)
    if found is None:
        names = [call["function"]["name"] for call in open_calls]
        raise BadRow(
            f"{where}.name", f"is {shorten(name)}; expected the function of a call before it: {shorten(names)}"
        )
    return found


def _without_result(open_calls: Sequence[ToolCall], before: str) -> str:
    first = open_calls[0]
    named = shorten(first["function"]["name"]) + (f" (id {shorten(first['id'])})" if "id" in first else "")
    return f"calls {named}, but its result is missing before {before}"


def check_end(parts: Sequence[Part], answered: bool) -> None:
    """Check the last message, and that there is something to learn.

    Raises:
        BadRow: the last message is not the assistant's where an answer is needed, or no answer is learnt.
    """
    said, column = joined(parts), parts[-1].column
    last = said[-1]["role"]
    if answered and last != "assistant":
        raise BadRow(column, f"ends with a {last} turn; the last turn must be the assistant's")
    if last in ("system", "developer"):
        raise BadRow(column, f"ends with a {last} turn; expected a user, tool or assistant turn")
    if answered and all(message.get("weight", 1) == 0 for message in said if message["role"] == "assistant"):
        raise BadRow(column, "has no answer to learn: each of the assistant's messages has weight 0")
