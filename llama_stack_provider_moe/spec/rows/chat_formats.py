"""Rows of conversations and of text, as people write them -> canonical rows."""

import re
from collections.abc import Mapping
from typing import Final

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.conversation_rules import Part, check_calls, check_end, joined, path
from llama_stack_provider_moe.spec.rows.message_reading import message, messages
from llama_stack_provider_moe.spec.rows.messages import Conversation, Message, Role, TextRow
from llama_stack_provider_moe.spec.rows.tool_calls import settings
from llama_stack_provider_moe.spec.rows.values import BadRow, Source, filled, from_json, text

# The beginning of a turn in HH-RLHF's transcripts.
_TURN: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS: Final[dict[str, Role]] = {"Human": "user", "Assistant": "assistant"}


def of_messages(source: Source, column: str) -> Conversation:
    """A column with a list of messages."""
    return finished(source, [messages(source.take(column), column, source)])


def of_prompt_completion(source: Source) -> Conversation:
    """A prompt and its answer, each a text or messages; the prompt's own answers are context."""
    return _answered(source, said(source, "prompt", "user"), "completion")


def of_llama_stack(source: Source) -> Conversation:
    """Messages, or the JSON text of them, and the answer to the last one."""
    column = "chat_completion_input"
    return _answered(source, messages(source.take(column), column, source), "expected_answer")


def _answered(source: Source, asked: Part, completion: str) -> Conversation:
    if completion not in source.columns:
        if source.answered:
            pair = {"chosen", "rejected"} <= source.columns.keys()
            told = "; chosen and rejected are for recipes dpo and reward" if pair else ""
            raise BadRow(completion, f"is missing beside {asked.column!r}{told}")
        return finished(source, [context(asked)])
    answer = said(source, completion, "assistant")
    must_follow(asked, answer)
    return finished(source, [context(asked), answer])


def of_alpaca(source: Source) -> Conversation:
    """`instruction`, `input` below it, `output`; earlier turns in `history`."""
    parts = alpaca_prompt(source)
    if "output" in source.columns:
        parts.append(said(source, "output", "assistant"))
    elif source.answered:
        raise BadRow("output", "is missing beside 'instruction'")
    return finished(source, parts)


def alpaca_prompt(source: Source) -> list[Part]:
    """The turns of `history` and the one of `instruction` and `input`."""
    asked = filled(source.take("instruction"), "instruction")
    if (more := source.take("input")) is not None and text(more, "input").strip():
        asked = f"{asked}\n{more}"
    parts = [Part("instruction", [{"role": "user", "content": asked}], listed=False)]
    history = source.take("history")
    if isinstance(history, str):
        history = from_json(history, "history", "a list of pairs") if history.strip() else []
    if history is None:
        return parts
    if not isinstance(history, list | tuple):
        raise BadRow("history", f"is {type(history).__name__}; expected a list of pairs [user's text, answer]")
    earlier: list[Message] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history[{index}]", f"is {shorten(pair)}; expected a pair [user's text, answer]")
        earlier += [
            {"role": "user", "content": filled(pair[0], f"history[{index}][0]")},
            {"role": "assistant", "content": filled(pair[1], f"history[{index}][1]")},
        ]
    return [Part("history", earlier, listed=False), *parts] if earlier else parts


def of_transcript(source: Source) -> Conversation:
    """The chosen one of HH-RLHF's transcripts."""
    found = transcript(source.take("chosen"), "chosen")
    return finished(source, [Part("chosen", found, listed=False)])


def is_transcript(value: object) -> bool:
    """Whether a value is a text that begins as HH-RLHF's do."""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:")


def transcript(value: object, where: str) -> list[Message]:
    """The messages of one of HH-RLHF's texts, "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Raises:
        BadRow: it is not one.
    """
    whole = filled(value, where)
    if not is_transcript(whole):
        raise BadRow(where, "does not begin with 'Human:', as HH-RLHF's transcripts do")
    _, *pieces = _TURN.split(whole.lstrip("\n"))
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [
        {"role": _SPEAKERS[speaker], "content": filled(content.strip(), f"{where}, turn {number}")}
        for number, (speaker, content) in enumerate(turns, start=1)
    ]


def of_text(source: Source) -> TextRow:
    """A text to learn as it is."""
    return {"text": filled(source.take("text"), "text")}


def said(source: Source, column: str, role: Role) -> Part:
    """The turns in a column: a text of one role, a list of messages, or one message."""
    value = source.take(column)
    if isinstance(value, str):
        return Part(column, [{"role": role, "content": filled(value, column)}], listed=False)
    if isinstance(value, Mapping):
        return Part(column, [message(value, column, source)], listed=False)
    return messages(value, column, source)


def context(part: Part) -> Part:
    """The same turns, whose answers are not learnt."""
    return part._replace(messages=[_unlearnt(each) for each in part.messages])


def _unlearnt(each: Message) -> Message:
    return {**each, "weight": 0} if each["role"] == "assistant" else each


def must_follow(prompt: Part, answer: Part) -> None:
    """Check that an answer begins with the assistant's turn, after a turn of somebody else.

    Raises:
        BadRow: it does not.
    """
    if (first := answer.messages[0]["role"]) != "assistant":
        raise BadRow(answer.column, f"begins with a {first} turn; give the answer alone, without the prompt")
    if prompt.messages[-1]["role"] == "assistant":
        raise BadRow(prompt.column, "ends with an assistant turn; expected the user's")


def finished(source: Source, parts: list[Part]) -> Conversation:
    """The conversation of these parts, with the row's system text, tools and template variables.

    Raises:
        BadRow: the turns do not make a conversation.
    """
    parts = with_system(source, parts)
    check_end(parts, source.answered)
    check_calls(parts)
    return {"messages": joined(parts), **settings(source)}


def with_system(source: Source, parts: list[Part]) -> list[Part]:
    """The parts behind the text of column `system`, if the row has one.

    Raises:
        BadRow: they begin with another system message.
    """
    told = source.take("system")
    if told is None or not text(told, "system").strip():
        return parts
    first = parts[0].messages[0]
    if first["role"] in ("system", "developer"):
        if first["content"] == told:
            return parts
        raise BadRow("system", f"differs from the {first['role']} message at {path(parts, 0)}; keep one of them")
    return [Part("system", [{"role": "system", "content": text(told, "system")}], listed=False), *parts]
