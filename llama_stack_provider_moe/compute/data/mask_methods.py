"""Where the learnt answers stand in a rendered conversation: by marks, by prefixes, or one answer at a time.

A method that is not certain of an answer's place raises `Unclear`; the next one is tried. Each answer's place is
checked: it holds the message's content and tool calls, and ends with a token that ends a turn.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llama_stack_provider_moe.compute.data.chat_template import Refused, Span, Template
from llama_stack_provider_moe.compute.data.template_probe import TurnEnd
from llama_stack_provider_moe.compute.models.row_images import texts_of
from llama_stack_provider_moe.spec.rows import Message
from llama_stack_provider_moe.spec.rows.images import words_of

_OPENED = re.compile(
    r"\s*<[^<>\n]*think[^<>\n]*>\s*(<[^<>\n]*think[^<>\n]*>\s*)?"
)  # a thought that a prompt opens (and may close)
_ANSWER = "qplaceq"  # stands for an answer, to see where its text begins


class Unclear(Exception):
    """A method does not know where an answer is, or the answer is not whole; the text says why."""


class Lost(Unclear):
    """The template does not render an answer's reasoning."""


class Apart(Unclear):
    """The rendered answer does not begin with the generation prompt."""


class Dropped(Unclear):
    """The template leaves out a message, or the tools."""


@dataclass(frozen=True)
class Place:
    """An answer in the text: characters [start, end), and what is to be put in behind them."""

    start: int
    end: int
    added: str = ""


@dataclass(frozen=True)
class Dialog:
    """A conversation to render: `messages` without those that are not to be seen, and what goes with them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    given: dict[str, object]

    def upto(self, stop: int) -> "Dialog":
        """The conversation's first `stop` messages."""
        return replace(self, messages=self.messages[:stop])

    def text(self, template: Template, answer_next: bool = False) -> str:
        """The conversation rendered by `template`."""
        return template.render(template.said(self.messages), self.tools, self.given, answer_next)[0]


def by_marks(template: Template, strict: bool, dialog: Dialog, learnt: Sequence[int]) -> tuple[str, list[Place]]:
    """By the generation marks of `template`.

    Args:
        template: with marks.
        strict: whether a mark that leaves out the token that ends a turn is made longer; not for TRL's templates, whose
            marks are followed to the letter as long as they end with an added token.
        dialog: the conversation.
        learnt: indices of the messages to learn.

    Raises:
        Refused: the template raised an error.
        Unclear: the marks can't be told apart, or an answer is not whole.
    """
    text, marks = template.render(template.said(dialog.messages), dialog.tools, dialog.given, marks=True)
    kept(template, dialog, text)
    whole = _joined([(start, end) for start, end in marks if end > start])
    marks = [(start, end) for start, end in marks if text[start:end].strip()]
    joined = _joined(marks)
    answers = [index for index, message in enumerate(dialog.messages) if message["role"] == "assistant"]
    held = _matched(text, marks, dialog, answers) or _matched(text, joined, dialog, answers)
    if held is not None:
        for index in learnt:
            check(text[slice(*held[index])], dialog.messages[index], template)
        spans = whole if list(learnt) == answers else _joined([held[index] for index in learnt])
    elif list(learnt) == answers and joined:
        inside = "".join(text[start:end] for start, end in joined)
        for index in learnt:
            check(inside, dialog.messages[index], template)
        spans = whole
    else:
        raise Unclear("the template's generation marks don't say which answer is which")
    return text, [_marked_end(text, span, template, strict) for span in spans]


def kept(template: Template, dialog: Dialog, text: str, answer_next: bool = False) -> None:
    """Check that the template renders every message of the conversation, and its tools.

    Raises:
        Dropped: it leaves one out.
    """
    missing = template.dropped(dialog.messages, dialog.tools, dialog.given, answer_next)
    if missing is None:
        missing = [
            f"the content of message {number} ({message['role']})"
            for number, message in enumerate(dialog.messages, start=1)
            if not all(_has(text, piece) for piece in _spoken(message))
        ]
    if missing:
        raise Dropped(f"the chat template leaves out {', '.join(missing)}")


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _matched(text: str, spans: Sequence[Span], dialog: Dialog, answers: Sequence[int]) -> dict[int, Span] | None:
    """The span of each answer, if there are as many and each holds its message's words."""
    if len(spans) != len(answers):
        return None
    for index, (start, end) in zip(answers, spans, strict=True):
        if not all(_has(text[start:end], piece) for piece in _spoken(dialog.messages[index])):
            return None
    return dict(zip(answers, spans, strict=True))


def _marked_end(text: str, span: Span, template: Template, strict: bool) -> Place:
    start, end = span
    said, following = text[start:end].rstrip(), text[end:]
    ends = {*template.dialect.answer.tokens, *template.dialect.call.tokens}
    closed = said.endswith(tuple(ends) if strict else template.closing)
    if not closed and template.dialect.answer.kind == "own":
        for token in sorted(ends, key=len, reverse=True):
            if following.lstrip().startswith(token):
                return Place(start, end + following.index(token) + len(token))
    if said and not said.endswith(template.closing):
        raise Unclear("a generation mark does not end with a token that ends a turn")
    return Place(start, end)


def by_prefixes(template: Template, dialog: Dialog, learnt: Sequence[int]) -> tuple[str, list[Place]]:
    """By what the template renders in addition with each answer; the whole text must start with every such prefix.

    Args:
        template: any.
        dialog: the conversation.
        learnt: indices of the messages to learn.

    Raises:
        Refused: the template raised an error.
        Unclear: the template changes earlier turns, or an answer is not whole.
    """
    whole = dialog.text(template)
    kept(template, dialog, whole)
    places = []
    for index in learnt:
        before = dialog.upto(index).text(template, answer_next=True)
        upto = whole if index == len(dialog.messages) - 1 else dialog.upto(index + 1).text(template)
        if not upto.startswith(before):
            raise Unclear(f"message {index + 1} does not begin with the chat template's generation prompt")
        if not whole.startswith(upto):
            raise Unclear(f"the chat template renders message {index + 1} differently once more messages follow")
        kept(template, dialog.upto(index), before, True)  # or else the answer's place has words of an earlier message
        check(whole[len(before) : len(upto)], dialog.messages[index], template)
        places.append(ended(whole, len(before), len(upto), dialog.messages[index], template))
    return whole, places


def one_answer(templates: Sequence[Template], dialog: Dialog) -> tuple[str, list[Place]]:
    """The conversation's last message as at inference: the messages before it, the generation prompt, the answer.

    If the text does not start with the prompt, the template's variables for thinking are tried. If it still does not,
    the prompt adds something (an opened thought) that the template does not render for a given answer; then the answer
    begins where the prompt and the text part, which must be in front of the first word that depends on the answer.

    Args:
        templates: the model's own, and TRL's training template of it, if there is one.
        dialog: ends with the answer.

    Raises:
        Refused: every template raised an error.
        Unclear: the answer's place is unknown, or the answer is not whole.
    """
    failures: list[Exception] = []
    apart: list[Template] = []
    for template in templates:
        for given in _variants(template, dialog):
            try:
                return _behind_prompt(template, replace(dialog, given=given))
            except (Refused, Unclear) as failure:
                failures.append(failure)
                if isinstance(failure, Apart) and given == dialog.given:
                    apart.append(template)
    for template in apart:
        try:
            return _where_prompt_parts(template, dialog)
        except (Refused, Unclear) as failure:
            failures.append(failure)
    raise telling(failures)


def telling(failures: Sequence[Exception]) -> Exception:
    """The failure that helps a person most."""
    for kind in (Lost, Dropped, Refused):
        for failure in failures:
            if isinstance(failure, kind):
                return failure
    return failures[-1]


def _variants(template: Template, dialog: Dialog) -> list[dict[str, object]]:
    """The row's variables, then those with thinking as this answer has it, where the template reads such a variable."""
    found = [dialog.given]
    answer = dialog.messages[-1]
    thinks = bool(answer.get("reasoning")) or "</think>" in (answer["content"] or "")
    for name in ("enable_thinking", "thinking"):
        if name not in dialog.given and re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", template.source):
            found.append({**dialog.given, name: thinks})
    return found


def _behind_prompt(template: Template, dialog: Dialog) -> tuple[str, list[Place]]:
    before, whole = dialog.upto(len(dialog.messages) - 1).text(template, answer_next=True), dialog.text(template)
    if not whole.startswith(before):
        raise Apart("the answer does not begin with the chat template's generation prompt")
    answer = dialog.messages[-1]
    kept(template, dialog.upto(len(dialog.messages) - 1), before, True)
    kept(template, dialog, whole)
    check(whole[len(before) :], answer, template)
    return whole, [ended(whole, len(before), len(whole), answer, template)]


def _where_prompt_parts(template: Template, dialog: Dialog) -> tuple[str, list[Place]]:
    context, answer = dialog.upto(len(dialog.messages) - 1), dialog.messages[-1]
    before, whole = context.text(template, answer_next=True), dialog.text(template)
    other: Message = {"role": "assistant", "content": _ANSWER}
    header, found, _ = replace(dialog, messages=[*context.messages, other]).text(template).rpartition(_ANSWER)
    begins = len(os.path.commonprefix([before, header, whole]))  # noqa: RUF071 - characters are meant
    said_before = _spoken(context.messages[-1]) if context.messages else []
    if not found or not all(_has(whole[:begins], piece) for piece in said_before):
        raise Unclear("the place of the answer behind the chat template's generation prompt is unknown")
    # The prompt is the header of an answer and one opened thought, nothing else.
    if not _OPENED.fullmatch(before[begins:]):
        raise Unclear(f"the chat template's generation prompt ends with {before[begins:]!r}, which the answer has not")
    kept(template, context, before, True)
    kept(template, dialog, whole)
    check(whole[begins:], answer, template)
    return whole, [ended(whole, begins, len(whole), answer, template)]


def ended(text: str, start: int, end: int, message: Message, template: Template) -> Place:
    """The place of an answer that the template rendered as [start, end), up to the token that ends it.

    The white space behind that token is the template's; the model never writes it.
    """
    how: TurnEnd = template.dialect.call if message.get("tool_calls") else template.dialect.answer
    said = text[start:end].rstrip()
    if how.kind == "own":
        if not said.endswith((*how.tokens, *template.closing)):
            raise Unclear("the answer does not end with the token that ends a turn")
        return Place(start, start + len(said))
    if how.kind == "next":
        if text.startswith(how.gap, end):
            return Place(start, end + len(how.gap))
        if end == len(text):
            return Place(start, end, how.gap)
        follows = max((token for token in template.closing if text.startswith(token, end)), key=len, default=None)
        if follows is None:
            raise Unclear("the message behind the answer does not begin with a token that ends a turn")
        return Place(start, end + len(follows))
    if template.eos is None:
        raise Unclear(
            "the chat template ends no answer with a token, and the tokenizer has no end-of-sequence token; set "
            "options.chat_template"
        )
    return Place(start, start + len(said), template.eos)


def check(said: str, message: Message, template: Template) -> None:
    """Check that `said` holds all of an answer.

    Raises:
        Lost: without its reasoning.
        Unclear: without its content or its tool calls.
    """
    reasoning = message.get("reasoning", "").strip()
    if reasoning and not _has(said, reasoning):
        raise Lost("the chat template leaves out the reasoning of the answer")
    for piece in _spoken(message):
        if not _has(said, piece):
            raise Unclear("the chat template leaves out a part of the answer, or changes it")
    for thought in _thoughts(words_of(message["content"])):
        if not _has(said, thought):
            raise Lost("the chat template leaves out the reasoning in the content of the answer")


def _spoken(message: Message) -> list[str]:
    """The words of a message that every rendering of it has: its content behind a thought, its calls' names."""
    words = [text.rpartition("</think>")[2].strip() for text in texts_of(message)]
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [piece for piece in (*words, *names) if piece]


def _thoughts(content: str) -> list[str]:
    before, found, _ = content.rpartition("</think>")
    thought = before.rpartition("<think>")[2].strip() if found else ""
    return [thought] if thought else []


def _has(text: str, piece: str) -> bool:
    """Whether `text` has `piece`, which a template may write as JSON."""
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text or json.dumps(piece)[1:-1] in text


def reasoned(messages: Sequence[Message], setting: Literal["keep", "last", "drop"]) -> list[Message]:
    """The messages with the reasoning that `options.reasoning` leaves."""
    if setting == "keep":
        return list(messages)
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    keeps = last if setting == "last" else -1
    return [
        message if index == keeps or message["role"] != "assistant" else _without_thought(message)
        for index, message in enumerate(messages)
    ]


def _without_thought(message: Message) -> Message:
    made: Message = {**message}
    made.pop("reasoning", None)
    content = words_of(message["content"])
    if "</think>" in content and (content.lstrip().startswith("<think>") or "<think>" not in content):
        made["content"] = content.partition("</think>")[2].lstrip()
    return made
