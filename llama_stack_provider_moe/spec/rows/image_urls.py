"""`data:` URLs of images: read whole, or from a stream of JSON Lines, so that memory never holds a row's images.

A stream's strings that begin with data:image, and stand where images stand (a value of url, image_url or image, or an
item of a list), are decoded as they arrive. The line gets a short reference instead, which `image_parts` resolves.
"""

import binascii
import re
from collections.abc import Callable
from typing import Final

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.image_files import BadImage, read_image, too_large
from llama_stack_provider_moe.spec.rows.images import ImageFormat, ImageLimits, ImagePart

_BEGIN: Final = b'"data:image'
# What stands before the string of an image.
_BEFORE: Final = re.compile(rb'(?:"(?:url|image_url|image)"[ \t]{0,8}:|[\[,])[ \t]{0,8}\Z')
_HELD: Final = 64  # bytes that wait for the next piece: more than `_BEFORE` and `_BEGIN` can match
_END: Final = re.compile(rb'["\n]')
_HEAD_BYTES: Final = 128  # before the comma
_HEAD: Final = re.compile(r"data:(image/[\w.+-]+);base64\Z", re.IGNORECASE)
_FORMATS: Final[dict[str, ImageFormat]] = {
    "image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/webp": "webp",
}  # fmt: skip
FORM: Final = "data:image/png;base64,... (or jpeg, webp)"


class UrlReader:
    """Decodes one `data:` URL that arrives in pieces; memory holds at most the largest image.

    Args:
        limits: of the server.
    """

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._head: bytes | None = b""  # until its comma
        self._format: ImageFormat | None = None
        self._rest = b""  # of base64, less than four characters
        self._content = bytearray()
        self._is_padded = False
        self.problem: str | None = None

    def feed(self, piece: bytes) -> None:
        """Read the next characters."""
        if self.problem is not None:
            return
        try:
            if self._head is not None:
                head, comma, piece = (self._head + piece).partition(b",")
                if len(head) > _HEAD_BYTES:
                    raise BadImage(f"has no comma in its first {_HEAD_BYTES} characters; expected {FORM}")
                self._head = None if comma else head
                if comma:
                    self._format = _format_of(head.decode("latin-1"))
            if self._head is None:
                self._decode(piece)
        except BadImage as bad:
            self.problem = str(bad)
            self._content.clear()

    def finish(self) -> tuple[bytes, ImagePart]:
        """Return the file's bytes and the canonical part.

        Raises:
            BadImage: jobs don't take such a file.
        """
        if self.problem is not None:
            raise BadImage(self.problem)
        if self._head is not None:
            raise BadImage(f"has no comma; expected {FORM}")
        if self._rest:
            raise BadImage("is not base64: it ends in the middle of a group of four characters")
        content = bytes(self._content)
        self._content.clear()
        part = read_image(content, self._limits)
        if part["format"] != self._format:
            raise BadImage(f"says that it is {self._format}, but its bytes are {part['format']}; expected the same")
        return content, part

    def _decode(self, piece: bytes) -> None:
        text = self._rest + piece
        whole = len(text) - len(text) % 4
        self._rest, text = text[whole:], text[:whole]
        if self._is_padded and (text or self._rest):
            raise BadImage("is not base64: more follows after its padding")
        try:
            self._content += binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            raise BadImage(f"is not base64 without gaps (found {shorten(_odd(text))})") from None
        self._is_padded = text.endswith(b"=")
        if len(self._content) > self._limits.max_bytes:
            raise too_large(self._limits)


def _odd(text: bytes) -> str:
    found = re.search(rb"[^A-Za-z0-9+/]", text)
    return text[found.start() :][:12].decode("latin-1") if found else text[:12].decode("latin-1")


def _format_of(head: str) -> ImageFormat:
    found = _HEAD.match(head)
    named = head[len("data:") :].partition(";")[0].lower()  # a scheme may be in capitals
    if named.startswith("image/svg"):
        raise BadImage("is SVG, a drawing and not pixels; expected PNG, JPEG or WebP")
    if named not in _FORMATS:
        raise BadImage(f"is of type {shorten(named)}; expected image/png, image/jpeg or image/webp")
    if found is None:
        raise BadImage(f"begins with {shorten(head)}; expected {FORM}")
    return _FORMATS[named]


def read_url(url: str, limits: ImageLimits) -> tuple[bytes, ImagePart]:
    """Return the bytes and the canonical part of a whole `data:` URL.

    Raises:
        BadImage: jobs don't take such a file.
    """
    reader = UrlReader(limits)
    reader.feed(url.encode("utf-8", "replace"))
    return reader.finish()


class UrlTaker:
    """Takes the images out of the text of JSON Lines.

    Args:
        limits: of the server.
        refer: stores a finished image, or gets why it is none; returns the text that stands for it.
    """

    def __init__(self, limits: ImageLimits, refer: Callable[[UrlReader], str]) -> None:
        self._limits = limits
        self._refer = refer
        self._rest = b""
        self._reader: UrlReader | None = None
        self._in_line = 0  # images so far; those beyond the limit are not even decoded

    def feed(self, piece: bytes) -> bytes:
        """Return the text that the next piece completes, without its images."""
        left, made = self._rest + piece, []
        while True:
            if self._reader is None:
                begin = _begin(left)
                if begin is None:
                    cut = max(0, len(left) - _HELD)
                    made.append(self._passed(left[:cut]))
                    self._rest = left[cut:]
                    return b"".join(made)
                made.append(self._passed(left[: begin + 1]))
                left = left[begin + 1 :]
                self._reader = UrlReader(self._limits)
                self._in_line += 1
                if self._in_line > self._limits.per_row:
                    self._reader.problem = (
                        f"is image {self._in_line:,} of its row; expected at most {self._limits.per_row}"
                    )
            end = _END.search(left)
            cut = len(left) - left.endswith(b"\\") if end is None else end.start()
            self._reader.feed(left[:cut].replace(b"\\/", b"/"))
            left = left[cut:]
            if end is None:
                self._rest = left
                return b"".join(made)
            made.append(self._refer(self._reader).encode())
            self._reader = None

    def _passed(self, text: bytes) -> bytes:
        if b"\n" in text:
            self._in_line = 0
        return text

    def finish(self) -> bytes:
        """Return the rest; an image without its end leaves a string without its end."""
        rest, self._rest = self._rest, b""
        if self._reader is not None:
            rest, self._reader = self._refer(self._reader).encode(), None
        return rest


def _begin(text: bytes) -> int | None:
    """Index of the quotation mark before an image; None if there is none."""
    at = text.find(_BEGIN)
    while at >= 0:
        if _BEFORE.search(text, max(0, at - _HELD), at):
            return at
        at = text.find(_BEGIN, at + 1)
    return None
