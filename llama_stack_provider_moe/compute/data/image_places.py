"""Put the tokens of images into a rendered conversation, where its chat template wrote one token for each."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_stack_provider_moe.compute.data.chat_template import Span
from llama_stack_provider_moe.compute.models.row_images import Image, Unseen
from llama_stack_provider_moe.ground.counting import number_of

if TYPE_CHECKING:
    from llama_stack_provider_moe.compute.models.images import Images


class Unrenderable(Exception):
    """The template can't render these messages, or the answer's place in the text is unknown."""


def with_images(
    text: str, spans: Sequence[Span], typed: Sequence[Span], images: Sequence[Image], known: "Images"
) -> tuple[str, list[Span], list[Span], list[Span]]:
    """The text with all tokens of its images, `spans` and `typed` moved to their new places, and the images' places.

    Args:
        text: the rendered conversation.
        spans: what is learnt of it, as [start, end) in characters.
        typed: special tokens that somebody typed; none of them stands for an image.
        images: in their order.
        known: says which tokens stand for each.

    Raises:
        Unrenderable: the template did not write one token for each image, or the processor does not take one.
    """
    places = [found.span() for found in re.finditer(re.escape(known.token), text)]
    places = [place for place in places if place not in set(typed)]
    if len(places) != len(images):
        raise Unrenderable(
            f"it has {number_of(len(images), 'image')}, and its text {len(places)} times {known.token!r}, with which "
            "the chat template says that an image is there"
        )
    pieces: list[str] = []
    pictured: list[Span] = []
    moves: list[tuple[int, int]] = []  # from this character on, everything moves by so much
    done = moved = 0
    for number, ((start, end), image) in enumerate(zip(places, images, strict=True), start=1):
        try:
            tokens = known.tokens(image)
        except Unseen as error:
            raise Unrenderable(f"image {number} of {len(images)}: {error}") from None
        pieces += [text[done:start], tokens]
        pictured.append((start + moved, start + moved + len(tokens)))
        moved += len(tokens) - (end - start)
        moves.append((end, moved))
        done = end

    def at(place: int) -> int:
        return place + next((by for first, by in reversed(moves) if first <= place), 0)

    def move(all_spans: Sequence[Span]) -> list[Span]:
        return [(at(start), at(end)) for start, end in all_spans]

    return "".join([*pieces, text[done:]]), move(spans), move(typed), pictured
