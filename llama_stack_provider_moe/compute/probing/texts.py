"""What is scored of a conversation: its views, each as the tokens that the model reads.

A view is rendered with the chat template and ends with the template's generation prompt, whoever spoke last, so the
token at `position` is the same in all of them. A message alone is rendered as a user's.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.data.rendering import Renderer, Unrenderable
from llama_stack_provider_moe.compute.probing.trunk import Trunk
from llama_stack_provider_moe.shields.probe_card import ProbeCard
from llama_stack_provider_moe.spec.ablation import Measure
from llama_stack_provider_moe.spec.probe import Views
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, Message, TextRow


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
        measure: the token that is read.
        views: of each conversation.
        max_length: tokens of the longest view.
    """

    def __init__(self, trunk: Trunk, measure: Measure, views: Views, max_length: int) -> None:
        self._renderer = Renderer(trunk.tokenizer)
        self._vocabulary = trunk.vocabulary
        self._measure, self._views, self._max_length = measure, views, max_length

    @staticmethod
    def of(trunk: Trunk, card: ProbeCard) -> "Reader":
        """The reader that a probe's card describes."""
        return Reader(trunk, Measure(position=card.position, span=card.span), card.views, card.max_length)

    def prompts(self, conversation: Conversation) -> list[Prompt]:
        """The tokens of each view, the whole conversation first.

        Raises:
            Unscorable: it can't be rendered, is too long, or lacks the token to read.
        """
        if not conversation["messages"]:
            raise Unscorable("it has no message")
        try:
            texts = [self._renderer.prompt(view) for view in views_of(conversation, self._views)]
            return [self._checked(tokens.ids) for tokens in self._renderer.tokens(texts)]
        except Unrenderable as problem:
            raise Unscorable(str(problem)) from None

    def _checked(self, ids: list[int]) -> Prompt:
        position, span = self._measure.position, self._measure.span
        if len(ids) > self._max_length:
            raise Unscorable(f"it has {len(ids)} tokens, more than options.max_length = {self._max_length}")
        if not -len(ids) <= position < len(ids):
            raise Unscorable(f"it has {len(ids)} tokens, none at probe.position = {position}")
        before = position if position >= 0 else len(ids) + position
        if span > before + 1:
            raise Unscorable(f"it has {before + 1} tokens up to probe.position = {position}, fewer than probe.span")
        if max(ids) >= self._vocabulary:
            raise Unscorable(f"the tokenizer gives id {max(ids)}, but the embedding has {self._vocabulary} rows")
        return Prompt(ids, [True] * len(ids))


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
