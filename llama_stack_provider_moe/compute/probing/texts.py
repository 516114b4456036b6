"""What is scored of a conversation: its views, each as the tokens that the model reads.

A view is rendered with the chat template and ends with the template's generation prompt, whoever spoke last, so the
token at `position` is the same in all of them. A message alone is rendered as a user's. The tokens of the messages' own
text are marked; those of a system message are not, unless there is no other.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Tokens, Unrenderable
from llama_stack_provider_moe.compute.probing.trunk import Trunk
from llama_stack_provider_moe.shields.probe_card import ProbeCard
from llama_stack_provider_moe.spec.ablation import Measure
from llama_stack_provider_moe.spec.probe import ReadTokens, Views
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, Message, TextRow

MOST_ALONE = 64  # messages that are scored one by one
_INSTRUCTING = ("system", "developer")


class Reading(NamedTuple):
    """The tokens of a text whose states are read; see `spec.probe.Probe`."""

    tokens: ReadTokens = "content"
    position: int = -1
    span: int = 1

    @property
    def measure(self) -> Measure:
        """The place in the form that directional ablation takes."""
        return Measure(position=self.position, span=self.span)


class Unscorable(ValueError):
    """A conversation has no score; the text says why."""


def as_conversation(row: CanonicalRow) -> Conversation:
    """A row as a conversation; a plain text is a user's message."""
    if "text" in row:
        return {"messages": [{"role": "user", "content": cast(TextRow, row)["text"]}]}
    return cast(Conversation, row)


def views_of(conversation: Conversation, views: Views) -> list[Conversation]:
    """The conversation itself, and those of its messages alone that `views` adds; messages without text add none."""
    found = [conversation]
    if views == "whole" or len(conversation["messages"]) == 1:
        return found
    alone = conversation["messages"][-1:] if views == "latest" else conversation["messages"]
    for message in alone:
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            found.append({"messages": [{"role": "user", "content": content}]})
    return found


class Reader:
    """Makes the tokens of conversations' views.

    Args:
        trunk: the model that reads them.
        reading: the tokens that are read.
        views: of each conversation.
        max_length: tokens of the longest view.
    """

    def __init__(self, trunk: Trunk, reading: Reading, views: Views, max_length: int) -> None:
        self._renderer = Renderer(trunk.tokenizer)
        self._vocabulary = trunk.vocabulary
        self._reading, self._views, self._max_length = reading, views, max_length

    @staticmethod
    def of(trunk: Trunk, card: ProbeCard) -> "Reader":
        """The reader that a probe's card describes."""
        return Reader(trunk, Reading(card.tokens, card.position, card.span), card.views, card.max_length)

    def prompts(self, conversation: Conversation) -> list[Prompt]:
        """The tokens of each view, the whole conversation first.

        Raises:
            Unscorable: it can't be rendered, is too long, or lacks the token to read.
        """
        count = len(conversation["messages"])
        if not count:
            raise Unscorable("it has no message")
        if self._views == "each" and count > MOST_ALONE:
            raise Unscorable(f"it has {count} messages, more than {MOST_ALONE}, each of which would be scored")
        try:
            texts = [self._rendered(view) for view in views_of(conversation, self._views)]
            return [self._checked(tokens) for tokens in self._renderer.tokens(texts)]
        except Unrenderable as problem:
            raise Unscorable(str(problem)) from None

    def _rendered(self, view: Conversation) -> Rendered:
        """The view as text, with the place of each message's own text."""
        text = self._renderer.prompt(view)
        messages = [each for each in view["messages"] if each["role"] not in _INSTRUCTING] or view["messages"]
        spans, at = [], 0
        for each in view["messages"]:
            content = each.get("content")
            content = content.strip() if isinstance(content, str) else ""
            start = text.text.find(content, at)
            if start < 0:
                raise Unscorable(f"the chat template changes the text of the {each['role']}'s message")
            at = start + len(content)
            if content and any(each is one for one in messages):
                spans.append((start, at))
        return text._replace(spans=spans)

    def _checked(self, tokens: Tokens) -> Prompt:
        ids, (kind, position, span) = tokens.ids, self._reading
        if len(ids) > self._max_length:
            raise Unscorable(f"it has {len(ids)} tokens, more than options.max_length = {self._max_length}")
        if kind == "content" and not any(tokens.said):
            raise Unscorable("its messages have no text")
        if not -len(ids) <= position < len(ids):
            raise Unscorable(f"it has {len(ids)} tokens, none at probe.position = {position}")
        before = position if position >= 0 else len(ids) + position
        if span > before + 1:
            raise Unscorable(f"it has {before + 1} tokens up to probe.position = {position}, fewer than probe.span")
        if max(ids) >= self._vocabulary:
            raise Unscorable(f"the tokenizer gives id {max(ids)}, but the embedding has {self._vocabulary} rows")
        return Prompt(ids, tokens.said)


def messages_of(given: Sequence[Mapping[str, str]]) -> Conversation:
    """A conversation of what a caller sent: role and content of each message.

    Raises:
        Unscorable: a message lacks one of them, or has no text.
    """
    messages: list[Message] = []
    for number, message in enumerate(given, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise Unscorable(f"message {number} has no role or no text")
        messages.append(cast(Message, {"role": role, "content": content}))
    return {"messages": messages}
