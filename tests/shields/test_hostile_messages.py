"""Forty and more hostile conversations, each with its verdict: the field that is refused, or the scored text."""

from typing import Any

import pytest

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.shields import messages as bounds
from llama_stack_provider_moe.shields.messages import canonical, of_text


def nested(depth: int) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    return value


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "a", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
# messages -> the field that the error names
REFUSED: list[tuple[Any, str]] = [
    ([], "messages"),
    ([USER] * 2001, "messages"),
    ([None], "messages[0]"),
    (["hi"], "messages[0]"),
    ([[USER]], "messages[0]"),
    ([nested(500)], "messages[0]"),
    ([7], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "root", "content": "hi"}], "messages[0].role"),
    ([{"role": "User", "content": "hi"}], "messages[0].role"),
    ([{"role": "user ", "content": "hi"}], "messages[0].role"),
    ([{"role": "usеr", "content": "hi"}], "messages[0].role"),  # a Cyrillic е
    ([{"role": ["user"], "content": "hi"}], "messages[0].role"),
    ([{"role": None, "content": "hi"}], "messages[0].role"),
    ([{"role": {"a": 1}, "content": "hi"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 7}], "messages[0].content"),
    ([{"role": "user", "content": True}], "messages[0].content"),
    ([{"role": "user", "content": {"text": "hi"}}], "messages[0].content"),
    ([{"role": "user", "content": nested(400)}], "messages[0].content[0]"),
    ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [None]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": 7}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": ["hi"]}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 257}], "messages[0].content"),
    ([{"role": "user", "content": "half \ud800"}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], "messages[0].content[0].text"),
    ([USER, {"role": "user", "content": "x" * 4_000_001}], "messages[1].content"),
    ([{"role": "user", "content": "x" * 2_000_001}] * 2, "messages"),
    ([{"role": "user", "content": "hi", "tool_calls": [CALL]}], "messages[0].tool_calls"),
    ([{"role": "tool", "content": "hi", "tool_calls": [CALL]}], "messages[0].tool_calls"),
    ([{"role": "user", "content": "hi", "function_call": CALL["function"]}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": CALL}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": "all"}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": ["all"]}], "messages[0].tool_calls[0]"),
    ([{"role": "assistant", "tool_calls": [CALL] * 129}], "messages[0].tool_calls"),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800", "arguments": "{}"}}]}],
        "messages[0].tool_calls[0].function.name",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "x" * 4_000_001}}]}],
        "messages[0].tool_calls[0].function.arguments",
    ),
]
# messages -> what is scored of the last one, and its parts of other types
ACCEPTED: list[tuple[Any, str, tuple[str, ...]]] = [
    ([{"role": "user", "content": "a\0b"}], "a\0b", ()),
    ([{"role": "user", "content": ""}], "", ()),
    ([{"role": "user", "content": []}], "", ()),
    ([{"role": "user", "content": "\u202ereversed \U0001f600"}], "\u202ereversed \U0001f600", ()),
    ([{"role": "user", "content": "x" * (1 << 20)}], "x" * (1 << 20), ()),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}], "a", ("image_url",)),
    ([{"role": "user", "content": [{"type": "input_audio", "data": nested(800)}]}], "", ("input_audio",)),
    ([{"role": "user", "content": [{"type": "Text", "text": "hidden"}]}], "", ("Text",)),
    ([{"role": "user", "content": [{"type": "x" * 9999}]}], "", ("x" * 32,)),
    ([{"role": "assistant", "content": None}], "", ()),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "no", ()),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]}], "a({})", ()),
    ([{"role": "assistant", "content": "I", "tool_calls": [{"function": None}]}], "I\n()", ()),
    ([{"role": "user", "content": "hi", "unknown": nested(800)}], "hi", ()),
]


def test_there_are_enough() -> None:
    assert len(REFUSED) >= 40


@pytest.mark.parametrize(("messages", "field"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_conversation_is_refused_at_its_field(messages: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        canonical(messages)
    assert refused.value.field == field
    assert len(str(refused.value)) < 300, "an attacker does not choose the size of an answer"


@pytest.mark.parametrize(("messages", "text", "others"), ACCEPTED, ids=[str(number) for number in range(len(ACCEPTED))])
def test_a_conversation_is_read(messages: Any, text: str, others: tuple[str, ...]) -> None:
    last = canonical(messages)[-1]
    assert (last.scored_text, last.other_parts) == (text, others)


def test_a_text_is_a_message_of_the_user() -> None:
    (message,) = of_text("hi")
    assert (message.role, message.text) == ("user", "hi")
    for bad in ("\ud800", "x" * (bounds.MAX_CHARACTERS + 1)):
        with pytest.raises(InvalidInput, match=r"^input\[2\]: "):
            of_text(bad, "input[2]")
