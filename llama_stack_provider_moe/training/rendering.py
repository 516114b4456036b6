"""Conversations -> token ids and the mask of what the assistant said, for any chat template.

A template is a black box here. What it renders for messages 1..i plus the generation prompt is what a server sends
to the model; what it renders beyond that, once turn i is added, is what the model has to say. So the answer's place
is found by rendering prefixes, and it is right only if each prefix is really how the whole begins. Templates that
rewrite earlier turns (Qwen3's, which drops their <think> part) break that, and are refused row by row rather than
masked wrongly.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.datarows import Message


class Unrenderable(Exception):
    """The template can't render these messages, or not so that the answer's place is known."""


class Rendered(NamedTuple):
    """A conversation as text; `spans` are the assistant's turns, as [start, end) in characters."""

    text: str
    spans: list[tuple[int, int]]


class Tokens(NamedTuple):
    """A conversation as token ids; `said` is true on the tokens of assistant turns."""

    ids: list[int]
    said: list[bool]


class Renderer:
    """One tokenizer's template, applied."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self._closing = tuple(token for token in {*added, *tokenizer.all_special_tokens} if token.strip())

    def _text(self, messages: Sequence[Message], answer_next: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_next
            )
        except TemplateError as error:
            raise Unrenderable(f"the chat template refuses the conversation ({error})") from None
        return text

    def conversation(self, messages: Sequence[Message], first: int = 0) -> Rendered:
        """Render `messages`; only assistant turns from index `first` on get a span."""
        whole = self._text(messages, answer_next=False)
        spans = []
        for index in range(first, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            before = self._text(messages[:index], answer_next=True)
            last = index == len(messages) - 1
            upto = whole if last else self._text(messages[: index + 1], answer_next=False)
            if not upto.startswith(before):
                raise Unrenderable(f"turn {index + 1} does not begin with the chat template's generation prompt")
            if not whole.startswith(upto):
                raise Unrenderable(
                    f"the chat template renders turn {index + 1} differently once more turns follow, so its loss mask "
                    "is unknown; keep one answer a row, or set options.chat_template"
                )
            spans.append((len(before), self._end_of_turn(upto)))
        return Rendered(whole, spans)

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """Render `messages` as they are sent to a model that is to answer; nothing of it has a span."""
        return Rendered(self._text(messages, answer_next=True), [])

    def _end_of_turn(self, text: str) -> int:
        # White space behind the token that ends a turn is the template's, never the model's, to write.
        closed = text.rstrip()
        return len(closed) if closed.endswith(self._closing) else len(text)

    def tokens(self, conversations: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise each text once and mark the tokens that hold any character of a span."""
        if not conversations:
            return []
        encoded = self._tokenizer(
            [conversation.text for conversation in conversations],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            Tokens(ids, _mark(offsets, conversation.spans))
            for ids, offsets, conversation in zip(
                encoded["input_ids"], encoded["offset_mapping"], conversations, strict=True
            )
        ]


def _mark(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    # By the boundaries of a span, not token by token: byte-level tokenizers may report white space as an empty range.
    said = [False] * len(offsets)
    for start, end in spans:
        first = next((index for index, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
        behind = next((index for index, (begin, _) in enumerate(offsets) if begin >= end), len(offsets))
        said[first:behind] = [True] * max(0, behind - first)
    return said
