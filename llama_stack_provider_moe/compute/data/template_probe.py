"""How a chat template wants its messages, found by rendering short conversations with it.

Which key holds the reasoning, whether it knows developer messages, which token ends an answer: what the template
renders decides, not its text.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llama_stack_provider_moe.compute.models.row_images import parts_of
from llama_stack_provider_moe.spec.rows import Message
from llama_stack_provider_moe.spec.rows.images import words_of

Said = dict[str, Any]  # a message as a template takes it
Render = Callable[[Sequence[Said], Sequence[Mapping[str, object]] | None], str]  # "" if the template refuses
INLINE = "<think>"  # reasoning is written into the content, between think tags
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_USER: Message = {"role": "user", "content": "qaskq"}
_NEXT: Message = {"role": "user", "content": "qnextq"}
_ANSWER: Message = {"role": "assistant", "content": "qanswerq"}
_CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "call12345", "function": {"name": "qtoolq", "arguments": {"qkey": "qvalueq"}}}
    ],
}
_RESULT: Message = {"role": "tool", "content": "qresultq", "name": "qtoolq", "tool_call_id": "call12345"}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "qtoolq",
        "description": "qtoolq",
        "parameters": {"type": "object", "properties": {"qkey": {"type": "string", "description": "qkey"}}},
    },
}


@dataclass(frozen=True)
class TurnEnd:
    """What ends an answer.

    `kind` is "own" if the template writes the token behind an answer, "next" if only the message that follows begins
    with it, and "none" if there is no such token. `gap` is the text from the end of the rendered answer to the end of
    the token (kind "next").
    """

    kind: Literal["own", "next", "none"]
    tokens: tuple[str, ...]
    gap: str = ""


@dataclass(frozen=True)
class Dialect:
    """How a template wants its messages."""

    parts: bool  # content as a list of parts
    developer: bool  # it renders developer messages
    reasoning: str | None  # the key of the reasoning, or INLINE
    text_arguments: bool  # arguments of tool calls as JSON text
    empty_content: bool  # "" where there is no content
    answer: TurnEnd
    call: TurnEnd


def inlined(reasoning: str, content: str | None) -> str:
    """Reasoning and content as one text, for templates that have no key for reasoning."""
    return f"<think>\n{reasoning}\n</think>\n\n{content or ''}"


def probe(render: Render, closing: Sequence[str], eos: str | None) -> Dialect:
    """The dialect of a template.

    Args:
        render: renders messages and tools.
        closing: tokens that may end an answer.
        eos: the end-of-sequence token, which ends an answer where the template has no token for it.
    """
    return _Probe(render, closing, eos).dialect()


def said(message: Message, dialect: Dialect) -> Said:
    """The message as a template of this dialect takes it."""
    made: Said = {key: value for key, value in message.items() if key not in ("weight", "reasoning", "content")}
    if message["role"] == "developer" and not dialect.developer:
        made["role"] = "system"
    content, reasoning = message["content"], message.get("reasoning")
    if reasoning and dialect.reasoning == INLINE:
        content = inlined(reasoning, words_of(content))
    elif reasoning and dialect.reasoning is not None:
        made[dialect.reasoning] = reasoning
    if content is None and dialect.empty_content:
        content = ""
    if (parts := parts_of(message)) is not None:
        made["content"] = [
            {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in parts
        ]
    elif content is not None:  # as in transformers: a missing key, because templates would write None
        made["content"] = [{"type": "text", "text": content}] if dialect.parts else content
    if dialect.text_arguments and "tool_calls" in message:
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return made


class _Probe:
    """Renders short conversations, to learn a template's dialect."""

    def __init__(self, render: Render, closing: Sequence[str], eos: str | None) -> None:
        self.render, self.closing, self.eos = render, closing, eos

    def text(self, messages: Sequence[Message], dialect: Dialect) -> str:
        """The rendered conversation, "" if the template refuses it."""
        tools = [_TOOL] if any("tool_calls" in message for message in messages) else None
        return self.render([said(message, dialect) for message in messages], tools)

    def dialect(self) -> Dialect:
        """What the template renders decides each point in turn."""
        none = TurnEnd("none", ())
        base = Dialect(False, True, None, False, False, none, none)
        plain = [_USER, _ANSWER]
        if "qaskq" not in self.text(plain, base):
            text = self.text(plain, replace(base, parts=True))
            base = replace(base, parts="qaskq" in text and "qanswerq" in text)
        developer = "qdevq" in self.text([{"role": "developer", "content": "qdevq"}, *plain], base)
        base = replace(base, developer=developer)
        for text_arguments, empty in ((False, False), (False, True), (True, False), (True, True)):
            tried = replace(base, text_arguments=text_arguments, empty_content=empty)
            if "qvalueq" in self.text([_USER, _CALL, _RESULT], tried):
                base = tried
                break
        else:  # it renders no tool call; "" makes fewer templates fail, and the calls are missed by name
            base = replace(base, empty_content=True)
        answer = self.end((_USER, _ANSWER, _NEXT), ("qanswerq", "qnextq"), base, None)
        call = self.end((_USER, _CALL, _RESULT), ("qvalueq", "qresultq"), base, answer)
        return replace(base, reasoning=self.reasoning(base), answer=answer, call=call)

    def reasoning(self, base: Dialect) -> str | None:
        """The key whose text the template renders in an answer or in a call."""
        for key in (*REASONING_KEYS, INLINE):
            for message in (_ANSWER, _CALL):
                text = self.text([_USER, {**message, "reasoning": "qthoughtq"}], replace(base, reasoning=key))
                if text.count("qthoughtq") == 1:
                    return key
        return None

    def end(
        self, messages: tuple[Message, Message, Message], words: tuple[str, str], base: Dialect, answer: TurnEnd | None
    ) -> TurnEnd:
        """What ends a message.

        Args:
            messages: one before it, the message, one behind it.
            words: the last word of the message, and a word of the one behind it.
            base: what is known of the dialect.
            answer: what ends a plain answer, if known.
        """
        last = self.text(messages[:2], base).rpartition(words[0])
        middle = self.text(messages, base).rpartition(words[1])[0].rpartition(words[0])
        if not last[1] or not middle[1]:
            return answer or self._plain_end(last[2] if last[1] else "")
        tail, following = last[2], middle[2]
        if answer is None or answer.kind == "own":
            common = os.path.commonprefix([tail, following])  # noqa: RUF071 - characters are meant
            found = [token for token in (self._last_whole(common), self._last(tail)) if token]
            if found:
                return TurnEnd("own", tuple(dict.fromkeys(found)))
            if answer is not None:
                return answer
        if answer is None or answer.kind == "next":
            rest = following.removeprefix(tail)
            token = self._first(rest) if following.startswith(tail) else None
            if token is not None:
                return TurnEnd("next", (token,), rest[: rest.index(token) + len(token)])
        return answer or self._plain_end(tail)

    def _plain_end(self, tail: str) -> TurnEnd:
        token = self._last(tail)
        if token:
            return TurnEnd("own", (token,))
        return TurnEnd("none", (self.eos,) if self.eos else ())

    def _last(self, text: str) -> str | None:
        ends = [token for token in self.closing if text.rstrip().endswith(token)]
        return max(ends, key=len, default=None)

    def _last_whole(self, common: str) -> str | None:
        """The token at the end of a common beginning, which may go on with the first characters of another token."""
        for end in range(len(common), -1, -1):
            token, rest = self._last(common[:end]), common[end:].strip()
            if token and (not rest or any(each.startswith(rest) for each in self.closing)):
                return token
        return None

    def _first(self, text: str) -> str | None:
        begins = [token for token in self.closing if text.lstrip().startswith(token)]
        return max(begins, key=len, default=None)
