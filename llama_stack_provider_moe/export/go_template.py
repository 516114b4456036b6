"""A tokenizer's chat template (Jinja) -> the same as a template of Ollama's (Go).

Read off by rendering: conversations of marked contents show what stands before the first message, between two messages
by their roles, and behind the last. A template for which that is all there is to know, whatever the conversation, is
written down as such; one that does more is told to be so, never guessed at. Ollama itself takes for a template without
one of its own the nearest of some 35 known ones, by edit distance (template/template.go): a short template that is none
of them can get another model's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import ExportError

ROLES = ("system", "user", "assistant")
# Each a conversation that a person's message ends, as it is when an answer is wanted.
_WITHOUT_SYSTEM = ("u", "uau", "uauau")
_WITH_SYSTEM = ("su", "suau", "suauau")
_BY_LETTER = {role[0]: role for role in ROLES}
_MARK = "Qx{}xQ"


class Irregular(ExportError):
    """A chat template does more than to put fixed texts around messages."""


@dataclass(frozen=True)
class Turns:
    """A chat template that puts fixed texts around messages.

    Attributes:
        before: (role before, or "" at the beginning; role) -> the text before a message's content.
        end: after the last message's content, with the beginning of an answer.
        notes: what it does not do as the tokenizer does.
    """

    before: dict[tuple[str, str], str]
    end: str
    notes: tuple[str, ...] = ()

    def go(self) -> str:
        """For Ollama; one line, all text in quotes, for a brace or a space of it to mean nothing else."""
        roles = [role for role in ROLES if any(known == role for _, known in self.before)]
        branches = [
            f"{{{{ {'' if i == 0 else 'else '}if eq .Role {_quoted(role)} }}}}{self._before(role)}{{{{ .Content }}}}"
            for i, role in enumerate(roles)
        ]
        return (
            f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{"".join(branches)}{{{{ end }}}}'
            f'{{{{ $last = .Role }}}}{{{{ end }}}}{{{{ if ne $last "assistant" }}}}{_text(self.end)}{{{{ end }}}}'
        )

    def after_answer(self) -> str:
        """What follows an assistant's content when the conversation goes on."""
        return self.before["assistant", "user"]

    def _before(self, role: str) -> str:
        texts = {last: text for (last, known), text in self.before.items() if known == role}
        if len(set(texts.values())) == 1:
            return _text(next(iter(texts.values())))
        # The last one stands also for what no tokenizer's template was asked for, a system message amid the others.
        *some, (_, final) = texts.items()
        chosen = [f"{{{{ {'' if i == 0 else 'else '}if eq $last {_quoted(last)} }}}}{_text(text)}"
                  for i, (last, text) in enumerate(some)]  # fmt: skip
        return f"{''.join(chosen)}{{{{ else }}}}{_text(final)}{{{{ end }}}}"


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What a tokenizer's chat template puts where.

    A beginning-of-sequence token at the very front is left out where the tokenizer puts one before any text: so does
    what runs the GGUF.

    Raises:
        Irregular: it does more than that, or there is none.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise Irregular("the tokenizer has no chat template, or several")
    try:
        found = _gathered(tokenizer, _WITHOUT_SYSTEM)
    except TemplateError as error:
        raise Irregular(f"the chat template does not render a plain conversation ({error})") from error
    notes = []
    if "strftime_now" in tokenizer.chat_template:
        notes.append("the chat template writes today's date; here it stays that of the export")
    try:
        with_system = _gathered(tokenizer, (*_WITHOUT_SYSTEM, *_WITH_SYSTEM))
    except (Irregular, TemplateError) as error:
        told = " ".join(str(error).split())[:160]
        notes.append(f"system messages are left out: the chat template takes none, or not at their place ({told})")
    else:
        found = with_system
    before, end = found
    bos = tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        before = {pair: text.removeprefix(bos) if pair[0] == "" else text for pair, text in before.items()}
    return Turns(before, end, tuple(notes))


def _gathered(tokenizer: PreTrainedTokenizerBase, shapes: Sequence[str]) -> tuple[dict[tuple[str, str], str], str]:
    before: dict[tuple[str, str], str] = {}
    ends: set[str] = set()
    for shape in shapes:
        roles = [_BY_LETTER[letter] for letter in shape]
        *texts, end = _around(tokenizer, roles)
        for pair, text in zip(pairwise(["", *roles]), texts, strict=True):
            if before.setdefault(pair, text) != text:
                raise Irregular(f"what stands before a message of {pair[1]} depends on more than the message before it")
        ends.add(end)
    if len(ends) > 1:
        raise Irregular("what stands after the last message depends on more than that message")
    return before, ends.pop()


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """The texts before, between and behind the contents of a conversation of `roles`."""
    marks = [_MARK.format(number) for number in range(len(roles))]
    conversation = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert isinstance(rest, str)
    texts = []
    for role, mark in zip(roles, marks, strict=True):
        if rest.count(mark) != 1:
            raise Irregular(f"a message of {role} does not appear once, and after the one before it")
        text, _, rest = rest.partition(mark)
        texts.append(text)
    return [*texts, rest]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Go reads these escapes as JSON does


def _text(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""
