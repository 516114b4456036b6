"""Turn conversations into token ids and a mask of the assistant's tokens, for any chat template.

The mask comes from the first of these that fits a conversation (see `mask_methods`): the template's own generation
marks; the marks of TRL's training template of this published template; the prefixes that the template renders; one row
for each answer, rendered as at inference.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data import typed_tokens
from llama_stack_provider_moe.compute.data.chat_template import Pair, Refused, Span, pair_of
from llama_stack_provider_moe.compute.data.image_places import Unrenderable, with_images
from llama_stack_provider_moe.compute.data.mask_methods import (
    Dialog,
    Dropped,
    Lost,
    Place,
    Unclear,
    by_marks,
    by_prefixes,
    kept,
    one_answer,
    reasoned,
    telling,
)
from llama_stack_provider_moe.compute.data.template_probe import INLINE
from llama_stack_provider_moe.compute.models.row_images import Image, images_of, parts_of, with_plain_texts
from llama_stack_provider_moe.spec import Options
from llama_stack_provider_moe.spec.rows import Conversation, Message

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images

__all__ = ["Method", "Rendered", "Renderer", "Rendering", "Tokens", "Unrenderable"]

OWN_MARKS = "the template's own generation marks"
TRAINING_MARKS = "TRL's training template of this published template"
PREFIXES = "prefixes of the conversation"
ONE_ANSWER = "one row for each answer"
TYPED = "special tokens kept as text"


class Method(Protocol):
    """A way to find the learnt answers of a conversation; see `mask_methods`."""

    def __call__(self, dialog: Dialog, *, learnt: Sequence[int]) -> tuple[str, list[Place]]: ...


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered; see the fields of the same names in `Options`."""

    turns: Literal["all", "last", "each"] = "all"
    reasoning: Literal["keep", "last", "drop"] = "keep"
    special_tokens: Literal["text", "control"] = "text"

    @staticmethod
    def of(options: Options) -> "Rendering":
        """The settings of a job."""
        return Rendering(options.turns, options.reasoning, options.special_tokens)


class Rendered(NamedTuple):
    """A conversation as text. Spans are [start, end) in characters.

    `spans` are what is learnt, `typed` the special tokens that are to stay text. A `plain` text gets the tokens that
    the tokenizer puts around a text, and all of it is learnt. `pictured` are the places of the `images` in the text.
    """

    text: str
    spans: list[Span]
    typed: Sequence[Span] = ()
    plain: bool = False
    images: Sequence[Image] = ()
    pictured: Sequence[Span] = ()


class Tokens(NamedTuple):
    """A conversation as token ids; `said` is true on the tokens to learn, `pictured` on those that stand for images.

    `pictured` is empty without images.
    """

    ids: list[int]
    said: list[bool]
    pictured: Sequence[bool] = ()
    images: Sequence[Image] = ()


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: with a chat template, unless only `text` is used.
        settings: which answers are learnt, and how.
        images: puts in the tokens of images; None: a template's one token stands for each.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: Rendering | None = None, images: "Images | None" = None
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._settings = settings or Rendering()
        self._typed = typed_tokens.pattern_of(tokenizer) if self._settings.special_tokens == "text" else None
        self._pairs: dict[str, Pair] = {}
        self.counts: Counter[str] = Counter()

    def row(self, conversation: Conversation, first: int = 0) -> list[Rendered]:
        """A conversation with its learnt answers: one text, or several if one text can't hold them.

        Args:
            conversation: of messages.
            first: index of the first message that may be learnt.

        Raises:
            Unrenderable: see there.
        """
        messages = conversation["messages"]
        learnt = [
            index
            for index, message in enumerate(messages)
            if index >= first and message["role"] == "assistant" and message.get("weight", 1)
        ]
        if not learnt:
            raise Unrenderable("no message of the assistant is to be learnt")
        if self._settings.turns == "last":
            learnt = learnt[-1:]
        if self._settings.turns == "each":
            return self._each(conversation, learnt)
        messages = reasoned(with_plain_texts(messages), self._settings.reasoning)
        conversation = {**conversation, "messages": messages}
        failures: list[Exception] = []
        for name, method in self._methods(conversation):
            try:
                return [self._made(conversation, name, partial(method, learnt=learnt))]
            except (Refused, Unclear) as failure:
                failures.append(failure)
        if all(isinstance(failure, Refused | Dropped) for failure in failures):  # no answer alone makes up for it
            raise self._reason(telling(failures))
        return self._each(conversation, learnt)

    def answer(self, conversation: Conversation, answer: Sequence[Message]) -> Rendered:
        """The conversation and an answer to it, rendered as at inference; only the answer is learnt.

        Args:
            conversation: the context.
            answer: the assistant's message, or its calls, their results, and its message.

        Raises:
            Unrenderable: see there.
        """
        context = conversation["messages"]
        whole: Conversation = {**conversation, "messages": [*context, *answer]}
        learnt = [index for index, message in enumerate(answer, start=len(context)) if message["role"] == "assistant"]
        if len(answer) == 1 and learnt:
            return self._each(whole, learnt)[0]
        failures: list[Exception] = [Unclear("the answer has no message of the assistant")]
        # Prefixes first: marks may include white space that the prompt has, or that the model never writes, and then
        # the other answer of a pair, of one message, would be compared with less.
        for name, method in reversed(list(self._methods(whole))) if learnt else ():
            try:
                return self._made(whole, name, partial(method, learnt=learnt))
            except (Refused, Unclear) as failure:
                failures.append(failure)
        raise self._reason(telling(failures))

    def prompt(self, conversation: Conversation) -> Rendered:
        """The conversation as it is sent to the model, without any span.

        Raises:
            Unrenderable: see there.
        """
        template = self._pair(conversation).own

        def render(dialog: Dialog) -> tuple[str, list[Place]]:
            text = dialog.text(template, answer_next=True)
            kept(template, dialog, text, True)
            return text, []

        try:
            return self._made(conversation, None, render)
        except (Refused, Unclear) as failure:
            raise self._reason(failure) from None

    def text(self, text: str) -> Rendered:
        """A text for continued pre-training: all of it is learnt, and the end-of-sequence token."""
        typed = [match.span() for match in self._typed.finditer(text)] if self._typed else []
        if typed:
            self.counts[TYPED] += len(typed)
        return Rendered(text, [(0, len(text))], typed, plain=True)

    def tokens(self, conversations: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise each text once and mark the tokens that contain a character of a span.

        Raises:
            Unrenderable: a special token is typed in one that the tokenizer can't write as text.
        """
        try:
            return self._tokens(conversations)
        except typed_tokens.Untypable as problem:
            raise Unrenderable(str(problem)) from None

    def tokens_of_rows(self, rows: Sequence[Sequence[Rendered]]) -> list[list[Tokens] | Unrenderable]:
        """The tokens of each row's texts, or why they have none; all texts are tokenised together."""
        try:
            tokens = iter(self._tokens([text for row in rows for text in row]))
        except typed_tokens.Untypable:
            return [self._tokens_or_problem(row) for row in rows]
        return [[next(tokens) for _ in row] for row in rows]

    def _tokens_or_problem(self, row: Sequence[Rendered]) -> list[Tokens] | Unrenderable:
        try:
            return self.tokens(row)
        except Unrenderable as problem:
            return problem

    def _tokens(self, conversations: Sequence[Rendered]) -> list[Tokens]:
        if not conversations:
            return []
        texts = [typed_tokens.with_markers(each.text, each.typed) for each in conversations]
        encoded = typed_tokens.encode(self._tokenizer, [text for text, _ in texts])
        made = []
        for conversation, coded, (text, marker) in zip(conversations, encoded, texts, strict=True):
            if conversation.typed:
                coded = typed_tokens.as_text(self._tokenizer, coded, text, marker)
            said = _mark(coded.offsets, conversation.spans)
            if conversation.images:
                pictured = _mark(coded.offsets, conversation.pictured)
                learnt = [each and not of_image for each, of_image in zip(said, pictured, strict=True)]
                made.append(Tokens(coded.ids, learnt, pictured, conversation.images))
                continue
            made.append(self._between(coded.ids) if conversation.plain else Tokens(coded.ids, said))
        return made

    def _between(self, ids: list[int]) -> Tokens:
        """A plain text's ids with the tokens around it, each once."""
        tokenizer = self._tokenizer
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        start = [tokenizer.bos_token_id] if begins else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        whole = [*start, *ids, *end]
        return Tokens(whole, [True] * len(whole))

    def plan(self, learnt: bool = True) -> list[str]:
        """Lines for a person: how the loss mask is made, what ends a turn, what becomes of reasoning and developers.

        Args:
            learnt: whether the rows' own answers are learnt; else the lines on them are left out.
        """
        pair = self._pair({"messages": []})
        method, template = self._usual(pair), pair.marks or pair.own
        dialect = template.dialect
        how = ONE_ANSWER if self._settings.turns == "each" else f"{method}; where it fails, {ONE_ANSWER}"
        ends = " or ".join(repr(token) for token in self._end_tokens())
        why = {
            "own": "as the chat template writes it",
            "next": "with which the next message begins",
            "none": "put behind each answer, because the chat template ends none with a token",
        }[dialect.answer.kind]
        thoughts = {None: "not rendered by this chat template", INLINE: "in <think> tags in front of the content"}
        where = thoughts.get(dialect.reasoning, f"in the template's {dialect.reasoning!r}")
        of_answers = [f"loss mask: {how}", f"end of a learnt turn: {ends}, {why}"] if learnt else []
        return [
            *of_answers,
            f"reasoning ({self._settings.reasoning}): {where}",
            "developer messages: " + ("as they are" if dialect.developer else "as system messages"),
        ]

    def ends(self) -> list[int]:
        """Ids of the tokens that end learnt turns."""
        return sorted({self._tokenizer.convert_tokens_to_ids(token) for token in self._end_tokens()})

    def _end_tokens(self) -> list[str]:
        pairs = [self._pair({"messages": []})]
        if isinstance(self._tokenizer.chat_template, dict):
            pairs.append(self._pair({"messages": [], "tools": [{}]}))
        dialects = [(pair.marks or pair.own).dialect for pair in pairs]
        return list(dict.fromkeys(token for each in dialects for token in (*each.answer.tokens, *each.call.tokens)))

    def _usual(self, pair: Pair) -> str:
        if pair.marks is None:
            return PREFIXES
        return OWN_MARKS if pair.marks is pair.own else TRAINING_MARKS

    def _methods(self, conversation: Conversation) -> Iterator[tuple[str, Method]]:
        pair = self._pair(conversation)
        if pair.marks is not None:
            yield self._usual(pair), partial(by_marks, pair.marks, pair.marks is pair.own)
        yield PREFIXES, partial(by_prefixes, pair.own)

    def _each(self, conversation: Conversation, learnt: Sequence[int]) -> list[Rendered]:
        templates = self._pair(conversation).all()
        rows = []
        for index in learnt:
            upto: Conversation = {**conversation, "messages": conversation["messages"][: index + 1]}
            try:
                rows.append(self._made(upto, ONE_ANSWER, lambda dialog: one_answer(templates, dialog)))
            except (Refused, Unclear) as failure:
                reason = self._reason(failure)
                where = "" if isinstance(failure, Dropped) else f"message {index + 1}: "
                first = "; nothing stands before this answer: begin with a user's message, or give it weight 0"
                if index > 0:
                    first = ""
                last = "" if index == learnt[-1] else "; options.turns 'last' learns the last answer alone"
                raise Unrenderable(f"{where}{reason}{first}{last}") from failure
        return rows

    def _made(
        self, conversation: Conversation, name: str | None, render: Callable[[Dialog], tuple[str, list[Place]]]
    ) -> Rendered:
        messages = reasoned(with_plain_texts(conversation["messages"]), self._settings.reasoning)
        if any(message["role"] == "assistant" and parts_of(message) is not None for message in messages):
            raise Unrenderable("a message of the assistant has an image; expected text")
        dialog = Dialog(messages, conversation.get("tools") or None, conversation.get("chat_template_kwargs") or {})
        marker = self._marker(dialog)
        if marker:
            dialog = self._with_markers(dialog, marker)
        text, places = render(dialog)
        text, spans = _put_in(text, places)
        typed: Sequence[Span] = ()
        if marker and self._typed:
            text, spans, typed = typed_tokens.unmarked(text, spans, self._typed, marker)
        if typed:
            self.counts[TYPED] += len(typed)
        if name is not None:
            self.counts[f"rows by {name}"] += 1
        images = images_of(messages)
        if images and self._images is not None:
            text, spans, typed, pictured = with_images(text, spans, typed, images, self._images)
            return Rendered(text, spans, typed, images=images, pictured=pictured)
        return Rendered(text, spans, typed, images=images)

    def _marker(self, dialog: Dialog) -> str | None:
        """A marker for typed special tokens; None if there are none."""
        if self._typed is None:
            return None
        texts = list(typed_tokens.texts_of([dialog.messages, dialog.tools, dialog.given]))
        if not any(self._typed.search(text) for text in texts):
            return None
        return typed_tokens.marker_for("".join(texts))

    def _with_markers(self, dialog: Dialog, marker: str) -> Dialog:
        assert self._typed is not None
        pattern = self._typed

        tools = cast(list[dict[str, Any]] | None, typed_tokens.marked(dialog.tools, pattern, marker))
        given = cast(dict[str, object], typed_tokens.marked(dialog.given, pattern, marker))
        return replace(
            dialog,
            messages=[typed_tokens.marked_message(each, pattern, marker) for each in dialog.messages],
            tools=tools,
            given=given,
        )

    def _reason(self, failure: Exception) -> Unrenderable:
        if isinstance(failure, Refused):
            return Unrenderable(f"the chat template refuses the conversation ({failure})")
        if isinstance(failure, Lost):
            return Unrenderable(f"{failure}; set options.reasoning to 'drop' to train without it")
        if isinstance(failure, Dropped) and ("`tools`" in str(failure) or "tool calls" in str(failure)):
            return Unrenderable(f"{failure}; change the row, or use a model with a chat template for tools, which "
                                "those of options.chat_template are not")  # fmt: skip
        return Unrenderable(f"{failure}; set options.chat_template, or change the row")

    def _pair(self, conversation: Conversation) -> Pair:
        source = self._tokenizer.get_chat_template(None, conversation.get("tools") or None)
        if source not in self._pairs:
            self._pairs[source] = pair_of(self._tokenizer, source)
        return self._pairs[source]


def _put_in(text: str, places: Sequence[Place]) -> tuple[str, list[Span]]:
    """The text with what is added behind each place, and the places with it."""
    pieces, spans, done, moved = [], [], 0, 0
    for place in places:
        pieces += [text[done : place.end], place.added]
        spans.append((place.start + moved, place.end + moved + len(place.added)))
        done, moved = place.end, moved + len(place.added)
    return "".join([*pieces, text[done:]]), spans


def _mark(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    # By the boundaries of a span, not by each token: byte-level tokenizers may report white space as an empty range.
    said = [False] * len(offsets)
    for start, end in spans:
        first = next((index for index, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
        behind = next((index for index, (begin, _) in enumerate(offsets) if begin >= end), len(offsets))
        said[first:behind] = [True] * max(0, behind - first)
    return said
