"""Special tokens that a person typed in a message stay text.

A marker, a private-use character that the row does not have, is put inside each typed token before the chat template
renders the row. Behind the template the marker goes again, and the places of the typed tokens remain. The tokenizer
sees the marked text first. Where a typed token stands between two special tokens of the template, that piece alone is
then tokenised again without the marker, as plain text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows import Message

Span = tuple[int, int]
_PRIVATE = range(0xE000, 0xF8FF)


class Untypable(Exception):
    """The tokenizer has no ids for a typed special token that are those of its text."""


class Encoding(NamedTuple):
    """Token ids, and the characters [start, end) of each."""

    ids: list[int]
    offsets: list[Span]


def pattern_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches the special tokens of the tokenizer, the longest first; None if it has none.

    A token of one character stays a control token: nothing can be put inside it.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = sorted(
        {text for text in {*added, *tokenizer.all_special_tokens} if len(text.strip()) > 1}, key=len, reverse=True
    )
    return re.compile("|".join(map(re.escape, found))) if found else None


def marker_for(text: str) -> str:
    """A private-use character that `text` does not have."""
    return next(chr(code) for code in _PRIVATE if chr(code) not in text)


def marked(value: object, pattern: re.Pattern[str], marker: str) -> object:
    """`value` (JSON's types) with `marker` behind the first character of each special token in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + marker + match[0][1:], value)
    if isinstance(value, Mapping):
        return {marked(key, pattern, marker): marked(each, pattern, marker) for key, each in value.items()}
    if isinstance(value, list):
        return [marked(each, pattern, marker) for each in value]
    return value


def marked_message(message: Message, pattern: re.Pattern[str], marker: str) -> Message:
    """A message with markers in what is typed; the tags of a thought in an answer are not."""
    made = cast(Message, marked(message, pattern, marker))
    content = message["content"]
    if message["role"] == "assistant" and isinstance(content, str) and "</think>" in content:
        # The tags of a thought are the template's, not typed text.
        before, _, behind = content.partition("</think>")
        lead, opened, thought = before.rpartition("<think>")
        parts = [cast(str, marked(part, pattern, marker)) for part in (lead, thought, behind)]
        made["content"] = f"{parts[0]}{opened}{parts[1]}</think>{parts[2]}"
    return made


def texts_of(value: object) -> Iterator[str]:
    """Every text in a value of JSON's types, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from texts_of(key)
            yield from texts_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts_of(each)


def unmarked(
    text: str, spans: Sequence[Span], pattern: re.Pattern[str], marker: str
) -> tuple[str, list[Span], list[Span]]:
    """The text without markers, the spans in it, and the places of the typed tokens in it."""
    places = [at for at, character in enumerate(text) if character == marker]
    clean = text.replace(marker, "")

    def moved(at: int) -> int:
        return at - sum(place < at for place in places)

    typed = []
    for number, place in enumerate(places):
        begin = place - number - 1  # the markers before this one are gone, and the token began one character earlier
        match = pattern.match(clean, begin) if begin >= 0 else None
        if match is not None:
            typed.append(match.span())
    return clean, [(moved(start), moved(end)) for start, end in spans], typed


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split_special_tokens: bool = False
) -> list[Encoding]:
    """Each text as tokens, without the tokens that the tokenizer adds on its own."""
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        split_special_tokens=split_special_tokens,
    )
    return [Encoding(*each) for each in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def with_markers(text: str, typed: Sequence[Span]) -> tuple[str, str]:
    """`text` with a marker in each of its typed tokens, and the marker."""
    marker = marker_for(text)
    pieces, behind = [], 0
    for start, _ in typed:
        pieces.append(text[behind : start + 1])
        behind = start + 1
    return marker.join([*pieces, text[behind:]]), marker


def as_text(tokenizer: PreTrainedTokenizerBase, coded: Encoding, text: str, marker: str) -> Encoding:
    """The tokens of `text` without its markers, in which no typed token is a special one.

    Args:
        tokenizer: made `coded`.
        coded: the tokens of `text`.
        text: with a marker in each typed token.
        marker: the marker.

    Raises:
        Untypable: see there.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ids: list[int] = []
    offsets: list[Span] = []
    gone = 0  # markers before the current token
    borders = [index for index, token in enumerate(coded.ids) if token in special]
    first = 0
    for border in [*borders, len(coded.ids)]:
        begin = coded.offsets[first - 1][1] if first else 0
        end = coded.offsets[border][0] if border < len(coded.ids) else len(text)
        piece, run = text[begin:end], Encoding(coded.ids[first:border], coded.offsets[first:border])
        if marker in piece:
            plain = _piece(tokenizer, piece, run.ids, marker)
            offsets += [(start + begin - gone, stop + begin - gone) for start, stop in plain.offsets]
            ids += plain.ids
        else:
            offsets += [(start - gone, stop - gone) for start, stop in run.offsets]
            ids += run.ids
        gone += piece.count(marker)
        if border < len(coded.ids):
            start, stop = coded.offsets[border]
            ids.append(coded.ids[border])
            offsets.append((start - gone, stop - gone))
        first = border + 1
    return Encoding(ids, offsets)


def _piece(tokenizer: PreTrainedTokenizerBase, piece: str, in_context: list[int], marker: str) -> Encoding:
    # Some tokenizers put a space before a text but not behind a special token. The marked piece shows which it is: it
    # must give the ids that it gave in its context, alone or behind an anchor that is cut off again.
    anchor = marker_for(piece)
    for before in ("", anchor, "\n", "."):
        alone, cut = encode(tokenizer, [before + piece, before], split_special_tokens=True)
        if alone.ids[: len(cut.ids)] == cut.ids and alone.ids[len(cut.ids) :] == in_context:
            [plain] = encode(tokenizer, [before + piece.replace(marker, "")], split_special_tokens=True)
            if plain.ids[: len(cut.ids)] != cut.ids:
                continue
            offsets = [(max(0, start - len(before)), stop - len(before)) for start, stop in plain.offsets]
            return Encoding(plain.ids[len(cut.ids) :], offsets[len(cut.ids) :])
    typed = shorten(piece.replace(marker, ""), 200)
    raise Untypable(
        f"this tokenizer can't give the ids of a special token typed in a message as text: {typed}; set "
        "options.special_tokens to 'control', or take the token out of the row"
    )
