"""Rows to token ids and marks: what is learnt of a row, and what is cut or left out because it is too long.

An encoder knows one recipe's rows. It can be pickled, because rows may be encoded by several processes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Rendering, Tokens, Unrenderable
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, Message, Preference, TextRow, ThumbRow

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images

IGNORED = -100
COLUMN_OF_IMAGES = "pictures"  # `Image.text` of each image, with spaces between them; TRL takes "images" for its own
Truncate = Literal["right", "left", "drop", "refuse"]
# What renders and tokenises: rows that another version encoded are not reused.
_LIBRARIES = ("llama-stack-provider-moe", "transformers", "tokenizers", "trl", "jinja2", "datasets")


class Problem(NamedTuple):
    """Why a row gives nothing to train on; one that is only too long may be left out."""

    reason: str
    droppable: bool = False


class Encoded(NamedTuple):
    """One row for the trainer, what was cut of it, its greatest token id, and its columns of text."""

    columns: dict[str, list[int]]
    truncated: bool
    greatest_id: int
    system_cut: bool = False
    texts: Mapping[str, str] = {}

    def column(self, name: str) -> list[int] | str:
        """The value of a column."""
        return self.texts[name] if name in self.texts else self.columns[name]


class Piece(NamedTuple):
    """Tokens that fit into the length, and what was cut to make them fit."""

    tokens: Tokens
    cut: bool = False
    start_cut: bool = False


@dataclass(frozen=True)
class Limit:
    """The largest number of tokens of a row, and what to do with a longer one.

    Attributes:
        length: the largest number of tokens.
        truncate: what to do with a longer row.
        told: the largest number, for messages; left out: it is `options.max_length`.
    """

    length: int
    truncate: Truncate = "right"
    told: str = ""

    def too_long(self, count: int) -> Problem | None:
        """The problem of a row of `count` tokens, if the setting asks for one instead of a cut."""
        if count <= self.length or self.truncate in ("right", "left"):
            return None
        if self.truncate == "drop":
            told = self.told or f"options.max_length = {self.length} tokens"
            return Problem(f"longer than {told}", droppable=True)
        told = self.told or f"options.max_length = {self.length}"
        return Problem(f"has {count} tokens, more than {told}; options.truncate: 'refuse'")

    def _too_long_with_images(self, tokens: Tokens) -> Problem:
        """Such a row is never cut: tokens of an image without the image's other tokens mean nothing."""
        return self.images_too_long(len(tokens.ids), sum(tokens.pictured))

    def images_too_long(self, count: int, of_images: int) -> Problem:
        """The problem of a row with images that has `count` tokens, more than the length."""
        told = f"has {count} tokens, {of_images} of them for images, more than options.max_length = {self.length}"
        if self.truncate == "drop":
            return Problem(told, droppable=True)
        return Problem(f"{told}; a row with images is not cut")

    def fit(self, tokens: Tokens, bos: int | None) -> Piece | Problem:
        """Cut tokens to the length; `bos` stays at the beginning."""
        ids, said = tokens.ids, tokens.said
        if tokens.images and len(ids) > self.length:
            return self._too_long_with_images(tokens)
        if problem := self.too_long(len(ids)):
            return problem
        if len(ids) <= self.length:
            return Piece(tokens)
        if self.truncate == "right":
            return Piece(Tokens(ids[: self.length], said[: self.length]), cut=True)
        kept = ids[:1] if ids[0] == bos else []
        begin = len(ids) - self.length + len(kept)
        # What stood before the first token is gone, so the model can't learn to predict it.
        return Piece(
            Tokens([*kept, *ids[begin:]], [*said[: len(kept)], False, *said[begin + 1 :]]), cut=True, start_cut=True
        )


@dataclass(frozen=True)
class Encoder:
    """Base of the encoders.

    Attributes:
        tokenizer: with a chat template.
        rendering: settings of the renderer.
        limit: the largest number of tokens.
        images: turns the rows' images into tokens; None: no row has one.
    """

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    limit: Limit
    images: "Images | None" = field(default=None, kw_only=True)

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer of this process."""
        return Renderer(self.tokenizer, self.rendering, self.images)

    def __getstate__(self) -> dict[str, object]:
        """Without the renderer: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("renderer", "fingerprint")}

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """Encode rows, each as one or several rows for the trainer."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the rows that the result depends on."""
        settings = {
            each.name: repr(getattr(self, each.name))
            for each in dataclasses.fields(self)
            if each.name not in ("tokenizer", "images")
        }
        known = {
            "encoder": type(self).__qualname__,
            "settings": settings,
            "tokenizer": _of_tokenizer(self.tokenizer),
            **({} if self.images is None else {"images": repr(self.images)}),
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def whole(self, row: CanonicalRow) -> list[Rendered]:
        """A conversation, or a plain text, with all that is learnt of it."""
        if "text" in row:
            return [self.renderer.text(cast(TextRow, row)["text"])]
        return self.renderer.row(cast(Conversation, row))

    def pictures(self, tokens: Tokens) -> Mapping[str, str]:
        """The column with a row's images; no column where no row has one."""
        return {} if self.images is None else {COLUMN_OF_IMAGES: " ".join(each.text() for each in tokens.images)}

    def fit(self, tokens: Tokens, row: CanonicalRow) -> tuple[Piece, bool] | Problem:
        """The tokens cut to the length, and whether a system message at the beginning was cut."""
        found = self.limit.fit(tokens, cast("int | None", self.tokenizer.bos_token_id))
        if isinstance(found, Problem):
            return found
        return found, found.start_cut and begins_with_system(row)


@dataclass(frozen=True)
class SftEncoder(Encoder):
    """Columns `input_ids` and `labels`, -100 for tokens without a loss; `train_on_input`: no token is without."""

    train_on_input: bool = False

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One row for each conversation, or several by `options.turns`."""
        rendered = rendered_rows(rows, self.whole)
        return [
            one if isinstance(one, Problem) else joined([self._finish(tokens, row) for tokens in one])
            for one, row in zip(tokens_of(self.renderer, rendered), rows, strict=True)
        ]

    def _finish(self, tokens: Tokens, row: CanonicalRow) -> Encoded | Problem:
        whole = tokens
        if self.train_on_input:
            learnt = [not each for each in tokens.pictured] or [True] * len(tokens.ids)
            whole = tokens._replace(said=learnt)
        found = self.fit(whole, row)
        if isinstance(found, Problem):
            return found
        piece, system_cut = found
        ids, said = piece.tokens.ids, piece.tokens.said
        if not any(said[1:]):  # the model never predicts the first token
            return nothing_learnt(whole, self.limit)
        labels = [token if learnt else IGNORED for token, learnt in zip(ids, said, strict=True)]
        columns = {"input_ids": ids, "labels": labels}
        return Encoded(columns, piece.cut, max(ids), system_cut, self.pictures(tokens))


def rendered_rows[R: CanonicalRow](
    rows: Sequence[R], render: Callable[[R], list[Rendered]]
) -> list[list[Rendered] | Problem]:
    """Each row as texts, or the reason why the chat template can't render it."""
    found: list[list[Rendered] | Problem] = []
    for row in rows:
        liveness.alive()
        try:
            found.append(render(row))
        except Unrenderable as problem:
            found.append(Problem(str(problem)))
    return found


def tokens_of(renderer: Renderer, rendered: Sequence[list[Rendered] | Problem]) -> list[list[Tokens] | Problem]:
    """The tokens of each row's texts, which are tokenised together, or the problem of the row."""
    made = iter(renderer.tokens_of_rows([one for one in rendered if not isinstance(one, Problem)]))
    found: list[list[Tokens] | Problem] = []
    for one in rendered:
        tokens = one if isinstance(one, Problem) else next(made)
        found.append(Problem(str(tokens)) if isinstance(tokens, Unrenderable) else tokens)
    return found


def joined(pieces: Sequence[Encoded | Problem]) -> list[Encoded] | Problem:
    """The rows that one source row gives; one that is too long is left out if others remain."""
    problems = [piece for piece in pieces if isinstance(piece, Problem)]
    kept = [piece for piece in pieces if not isinstance(piece, Problem)]
    refused = [problem for problem in problems if not problem.droppable]
    if refused or not kept:
        return (refused or problems or [Problem("it has no answer to learn")])[0]
    return [piece._replace(truncated=True) for piece in kept] if problems else kept


def nothing_learnt(tokens: Tokens, limit: Limit) -> Problem:
    """The problem of a row without a token to learn: too long, or without one at any length."""
    if any(tokens.said[1:]):
        return Problem(f"no token to learn within options.max_length = {limit.length}", droppable=True)
    return Problem("it has no token to learn")


def first_said(tokens: Tokens) -> int:
    """Index of the assistant's first token."""
    return tokens.said.index(True)


def last_said(tokens: Tokens) -> int:
    """Index of the assistant's last token."""
    return len(tokens.said) - 1 - tokens.said[::-1].index(True)


def context_of(row: Conversation | Preference | ThumbRow, messages: list[Message]) -> Conversation:
    """Messages as a conversation with the row's tools and variables."""
    context: Conversation = {"messages": messages}
    if "tools" in row:
        context["tools"] = row["tools"]
    if "chat_template_kwargs" in row:
        context["chat_template_kwargs"] = row["chat_template_kwargs"]
    return context


def before_last(row: Conversation) -> Conversation:
    """The conversation without its last message."""
    return context_of(row, row["messages"][:-1])


def begins_with_system(row: CanonicalRow) -> bool:
    messages = cast(list[Message], row.get("prompt") or row.get("messages") or [])
    return bool(messages) and messages[0]["role"] in ("system", "developer")


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {
        "class": type(tokenizer).__qualname__,
        # Calls change these two; rows are tokenised without either.
        "model": {name: value for name, value in model.items() if name not in ("padding", "truncation")},
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
