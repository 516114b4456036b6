"""Tool calls that an assistant's text holds, as Hermes' and similar data have them -> `tool_calls` and tool messages.

    assistant  I look it up. <tool_call>{"name": "tide", "arguments": {"port": "Brest"}}</tool_call>
    tool       <tool_response>5 m</tool_response>

Only where a tool's result follows such a text are calls read from it: a text that nobody answers stays a text. In a row
where calls were read, so are those of the last answer.
"""

import json
import re
from collections.abc import Sequence
from typing import Final, cast

from llama_stack_provider_moe.spec.rows.conversation_rules import NO_CALL, Part
from llama_stack_provider_moe.spec.rows.images import words_of
from llama_stack_provider_moe.spec.rows.messages import Message, ToolCall
from llama_stack_provider_moe.spec.rows.tool_calls import called
from llama_stack_provider_moe.spec.rows.values import BadRow, Source

NOTE: Final = "tool calls read from text"
_CALL: Final = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT: Final = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)


def with_typed_calls(part: Part, source: Source) -> Part:
    """A column's messages with the calls and results that stand in their texts as messages of their own.

    Raises:
        BadRow: a tool's result follows a text whose call can't be read.
    """
    said = part.messages
    answered = [
        index for index, following in enumerate(said[1:]) if following["role"] == "tool" and _holds_call(said[index])
    ]
    if not answered:
        return part
    if _holds_call(said[-1]):
        answered.append(len(said) - 1)
    made: list[Message] = []
    numbers: list[int] = []
    is_result = False
    for index, message in enumerate(said):
        pieces = [message]
        if index in answered:
            is_result = True
            try:
                pieces = [_with_calls(message, f"{part.column}[{index}]", source)]
            except BadRow as problem:
                if index == len(said) - 1:
                    raise
                raise BadRow(f"{part.column}[{index + 1}]", f"{NO_CALL}; {problem.field} {problem.reason}") from None
        elif is_result and message["role"] == "tool":
            pieces = _results(message)
        else:
            is_result = False
        made += pieces
        numbers += [index] * len(pieces)
    source.notes |= {"tool calls", NOTE}
    return part._replace(messages=made, numbers=numbers)


def _holds_call(message: Message) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message and "<tool_call>" in _spoken(message)[1]


def _spoken(message: Message) -> tuple[str, str]:
    """The thought at the beginning of a message's content, and what follows."""
    before, found, behind = words_of(message["content"]).rpartition("</think>")
    return before + found, behind


def _with_calls(message: Message, where: str, source: Source) -> Message:
    thought, spoken = _spoken(message)
    calls = [_call(text, where, source) for text in _CALL.findall(spoken)]
    around = _CALL.split(spoken)[::2]
    if any("<tool_call>" in text or "</tool_call>" in text for text in around):
        raise BadRow(where, "has a <tool_call> without its end, or an end without its beginning")
    text = "\n".join(piece for piece in map(str.strip, around) if piece)
    gap = spoken[: len(spoken) - len(spoken.lstrip())] if thought and text else ""
    made: Message = {**message, "content": f"{thought}{gap}{text}" or None}
    made["tool_calls"] = calls
    return made


def _call(text: str, where: str, source: Source) -> ToolCall:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(where, f"has a <tool_call> that is not JSON ({error})") from None
    if not isinstance(found, dict) or not {"name", "arguments"} <= found.keys():
        raise BadRow(where, "has a <tool_call> that is not an object with name and arguments")
    return called(cast(object, found), f"{where}: <tool_call>", source)


def _results(message: Message) -> list[Message]:
    content = words_of(message["content"])
    texts: Sequence[str] = _RESULT.findall(content)
    if not texts or _RESULT.sub("", content):
        return [message]
    return [{**message, "content": text.strip()} for text in texts]
