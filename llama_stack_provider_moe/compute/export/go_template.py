"""Translate a tokenizer's chat template (Jinja) into a template for Ollama (Go).

This works by rendering: conversations with marked contents show the texts before the first message, between two
messages depending on their roles, and after the last. A template that consists of these texts, whatever the
conversation, is translated; one that does more is reported, never guessed. What a reasoning or tool-calling model's
template renders beyond that (earlier thinking, tools, calls and results) is probed and noted.

For a GGUF without a Go template, Ollama itself takes the nearest of about 35 known ones by edit distance
(template/template.go): a short template that is not among them can get that of another model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.models.chat_templates import default_template
from llama_stack_provider_moe.errors import ExportError

ROLES = ("system", "user", "assistant")
# Conversations that end with a user's message, as when the model should answer.
_WITHOUT_SYSTEM = ("u", "uau", "uauau")
_WITH_SYSTEM = ("su", "suau", "suauau")
_BY_LETTER = {role[0]: role for role in ROLES}
_MARK = "Qx{}xQ"
# What is unlikely in a chat template: it tells whether one renders a part of a conversation.
_THOUGHT, _RESULT = "Qx thought xQ", "Qx result xQ"
_CALL = {"type": "function", "id": "callQ0001", "function": {"name": "Qf", "arguments": {"Qh": "Qi"}}}


class UnsupportedTemplate(ExportError):
    """The chat template does more than put fixed texts around messages."""


@dataclass(frozen=True)
class Turns:
    """A chat template that puts fixed texts around messages.

    Attributes:
        before: (previous role, or "" at the start; role) -> the text before a message's content.
        end: text after the last message's content, including the start of an answer.
        notes: differences from the tokenizer's template.
    """

    before: dict[tuple[str, str], str]
    end: str
    notes: tuple[str, ...] = ()

    def go(self) -> str:
        """The Go template for Ollama: one line, with all text in quotes so that braces and spaces are literal."""
        roles = [role for role in ROLES if any(known == role for _, known in self.before)]
        branches = [
            f"{{{{ {'' if i == 0 else 'else '}if eq .Role {_quoted(role)} }}}}{self._before(role)}{{{{ .Content }}}}"
            for i, role in enumerate(roles)
        ]
        return (
            f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{"".join(branches)}{{{{ end }}}}'
            f'{{{{ $last = .Role }}}}{{{{ end }}}}{{{{ if ne $last "assistant" }}}}{_text(self.end)}{{{{ end }}}}'
        )

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the Go template renders for messages that end with the user's."""
        pairs = pairwise(["", *(message["role"] for message in messages)])
        texts = [self.before[pair] + message["content"] for pair, message in zip(pairs, messages, strict=True)]
        return "".join(texts) + self.end

    def after_answer(self) -> str:
        """The text after an assistant's content when the conversation continues."""
        return self.before["assistant", "user"]

    def _before(self, role: str) -> str:
        texts = {last: text for (last, known), text in self.before.items() if known == role}
        if len(set(texts.values())) == 1:
            return _text(next(iter(texts.values())))
        # The last one also covers cases that were not rendered, such as a system message between others.
        *some, (_, final) = texts.items()
        chosen = [f"{{{{ {'' if i == 0 else 'else '}if eq $last {_quoted(last)} }}}}{_text(text)}"
                  for i, (last, text) in enumerate(some)]  # fmt: skip
        return f"{''.join(chosen)}{{{{ else }}}}{_text(final)}{{{{ end }}}}"


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Find the fixed texts of a tokenizer's chat template.

    A beginning-of-sequence token at the very start is left out if the tokenizer adds one to any text, because the
    runtime of the GGUF adds it too.

    Raises:
        UnsupportedTemplate: the template does more than that, or there is none.
    """
    source = default_template(tokenizer)
    if source is None:
        raise UnsupportedTemplate("the tokenizer has no chat template, or several without a default")
    try:
        found = _gathered(tokenizer, _WITHOUT_SYSTEM)
    except TemplateError as error:
        raise UnsupportedTemplate(f"the chat template does not render a plain conversation ({error})") from error
    notes = []
    if "strftime_now" in source:
        notes.append("the chat template inserts the current date; this one keeps the date of the export")
    try:
        with_system = _gathered(tokenizer, (*_WITHOUT_SYSTEM, *_WITH_SYSTEM))
    except (UnsupportedTemplate, TemplateError) as error:
        why = " ".join(str(error).split())[:160]
        notes.append(f"system messages are left out: the chat template rejects or moves them ({why})")
    else:
        found = with_system
    before, end = found
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        before = {pair: text.removeprefix(bos) if pair[0] == "" else text for pair, text in before.items()}
    notes += [*_of_thinking(tokenizer, Turns(*found)), *_of_tools(tokenizer)]
    return Turns(before, end, tuple(notes))


def _of_thinking(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Iterator[str]:
    """Notes on how the chat template of a reasoning model renders thinking, where the Go template does not.

    Args:
        tokenizer: with the chat template.
        turns: the fixed texts, with a beginning-of-sequence token that the template writes.
    """
    asked, again = {"role": "user", "content": "Qa"}, {"role": "user", "content": "Qb"}
    for opened, closed in _marks_of_thinking(tokenizer):
        answer = {"role": "assistant", "content": f"{opened}\n{_THOUGHT}\n{closed}\n\nQc"}
        expected = _rendered(tokenizer, [asked, answer, again])
        if expected is None or expected == turns.rendered([asked, answer, again]):
            continue
        if _THOUGHT in expected:
            yield f"the chat template renders the thinking ({opened}) of earlier answers in another way than this one"
        else:
            yield (
                f"the chat template drops the thinking ({opened}) of earlier answers; this one keeps what a client "
                "sends back of it"
            )
    for key in ("reasoning_content", "thinking", "reasoning"):
        apart = {"role": "assistant", "content": "Qc", key: _THOUGHT}
        histories: list[list[Mapping[str, object]]] = [
            [asked, apart, again],
            [asked, {**apart, "tool_calls": [_CALL]}, {"role": "tool", "content": "Qd", "tool_call_id": "callQ0001"}],
        ]
        if any(_THOUGHT in (_rendered(tokenizer, history) or "") for history in histories):
            yield (
                f"the chat template renders thinking that is apart from the answer ({key}); this one leaves it out "
                "(.Thinking)"
            )
            return


def _marks_of_thinking(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Texts around thinking in an answer's content: the usual ones, and the tokenizer's added tokens of that name."""
    added = {str(token) for token in tokenizer.added_tokens_encoder}
    pairs = [(token, f"{token[:1]}/{token[1:]}") for token in sorted(added) if "think" in token.lower()]
    return list(dict.fromkeys([("<think>", "</think>"), *(pair for pair in pairs if pair[1] in added)]))


def _of_tools(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Notes on what the chat template of a tool-calling model renders, and the Go template leaves out."""
    asked: dict[str, object] = {"role": "user", "content": "Qa"}
    function = {"name": "Qf", "description": "Qg", "parameters": {"type": "object", "properties": {}}}
    tools: list[dict[str, object]] = [{"type": "function", "function": function}]
    if "Qf" in (_rendered(tokenizer, [asked], tools) or ""):
        yield "the chat template renders the request's tools; this one leaves them out (.Tools)"
    result: dict[str, object] = {
        "role": "tool", "content": _RESULT, "tool_call_id": "callQ0001", "name": "Qf",
    }  # fmt: skip
    history = ""
    for arguments in ({"Qh": "Qi"}, json.dumps({"Qh": "Qi"})):  # chat templates take one or the other
        call = {**_CALL, "function": {"name": "Qf", "arguments": arguments}}
        called: dict[str, object] = {"role": "assistant", "content": "", "tool_calls": [call]}
        history = history or _rendered(tokenizer, [asked, called, result], tools) or ""
    if "Qi" in history:
        yield "the chat template renders earlier tool calls; this one leaves them out (.ToolCalls)"
        if _RESULT in history:
            yield "the chat template renders the results of tools; this one leaves messages of role tool out"


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    tools: list[dict[str, object]] | None = None,
) -> str | None:
    """What the chat template renders before an answer; None if it refuses the conversation."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, KeyError):  # a template may add texts to what is missing
        return None
    assert isinstance(text, str)
    return text


def _gathered(tokenizer: PreTrainedTokenizerBase, shapes: Sequence[str]) -> tuple[dict[tuple[str, str], str], str]:
    before: dict[tuple[str, str], str] = {}
    ends: set[str] = set()
    for shape in shapes:
        roles = [_BY_LETTER[letter] for letter in shape]
        *texts, end = _around(tokenizer, roles)
        for pair, text in zip(pairwise(["", *roles]), texts, strict=True):
            if before.setdefault(pair, text) != text:
                raise UnsupportedTemplate(
                    f"the text before a message of {pair[1]} depends on more than the message before it"
                )
        ends.add(end)
    if len(ends) > 1:
        raise UnsupportedTemplate("the text after the last message depends on more than that message")
    return before, ends.pop()


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """The texts before, between and after the contents of a conversation of `roles`."""
    marks = [_MARK.format(number) for number in range(len(roles))]
    conversation = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert isinstance(rest, str)
    texts = []
    for role, mark in zip(roles, marks, strict=True):
        if rest.count(mark) != 1:
            raise UnsupportedTemplate(f"a message of {role} does not appear exactly once, after the one before it")
        text, _, rest = rest.partition(mark)
        texts.append(text)
    return [*texts, rest]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Go reads these escapes as JSON does


def _text(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""
