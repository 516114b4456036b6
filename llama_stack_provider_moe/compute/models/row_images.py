"""Images in canonical rows: which messages have them, and what they are. Nothing here reads a file."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from llama_stack_provider_moe.spec.rows import Message


class Unseen(Exception):
    """A processor does not take an image of this size."""


class Image(NamedTuple):
    """An image that a row names.

    Attributes:
        sha256: of its file.
        format: png, jpeg or webp.
        width: in pixels.
        height: in pixels.
    """

    sha256: str
    format: str
    width: int
    height: int

    def text(self) -> str:
        """The image in a column of text.

        >>> Image("ab12", "png", 28, 56).text()
        'ab12.png.28x56'
        """
        return f"{self.sha256}.{self.format}.{self.width}x{self.height}"


def image_of(text: str) -> Image:
    """The image that `Image.text` wrote."""
    sha256, kind, size = text.split(".")
    width, height = size.split("x")
    return Image(sha256, kind, int(width), int(height))


def parts_of(message: Message) -> Sequence[Mapping[str, object]] | None:
    """The parts of a message's content; None if it is a text."""
    content = cast(object, message["content"])
    return cast("list[Mapping[str, object]]", content) if isinstance(content, list) else None


def images_of(messages: Sequence[Message]) -> list[Image]:
    """The images of a conversation, in its order."""
    return [
        Image(str(part["sha256"]), str(part["format"]), cast(int, part["width"]), cast(int, part["height"]))
        for message in messages
        for part in parts_of(message) or ()
        if part["type"] == "image"
    ]


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content, without images."""
    parts = parts_of(message)
    if parts is None:
        return [cast(str, message["content"])] if message["content"] else []
    return [str(part["text"]) for part in parts if part["type"] == "text"]


def with_plain_texts(messages: Sequence[Message]) -> list[Message]:
    """The messages, with the parts of those that have no image joined to one text."""
    return [
        message if parts_of(message) is None or images_of([message])
        else cast(Message, {**message, "content": "".join(texts_of(message))})
        for message in messages
    ]  # fmt: skip
