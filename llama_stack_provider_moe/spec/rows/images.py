"""Images in rows: the canonical part of a message, its file's name, and how many and how large images may be.

    {"type": "image", "sha256": "<64 hex digits>", "format": "png" | "jpeg" | "webp", "width": W, "height": H}

A row names an image by the SHA-256 of its file; the bytes are beside the rows, in `images/<sha256>.<png|jpg|webp>`,
once for each hash. Rows never hold them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypedDict, cast, get_args

from pydantic import Field

from llama_stack_provider_moe.spec import Block

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: Final[tuple[ImageFormat, ...]] = get_args(ImageFormat)
SUFFIXES: Final[Mapping[ImageFormat, str]] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
FOLDER: Final = "images"  # beside the rows
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = frozenset({"type", "sha256", "format", "width", "height"})


class TextPart(TypedDict):
    """A text between images."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """An image; width and height in pixels, as its file's header says."""

    type: Literal["image"]
    sha256: str
    format: ImageFormat
    width: int
    height: int


ContentPart = TextPart | ImagePart
Content = str | list[ContentPart] | None


class ImageLimits(Block):
    """The images that a row may have; a file's header is read, and no image is decoded by the server."""

    per_row: int = Field(default=10, ge=1, le=100, description="Maximum number of images in a row.")
    max_bytes: int = Field(
        default=10_000_000, ge=1024, le=100_000_000, description="Maximum size of an image's file in bytes."
    )
    max_pixels: int = Field(
        default=40_000_000,
        ge=1,
        le=400_000_000,
        description="Maximum number of pixels of an image, width times height.",
    )


def file_name(sha256: str, image_format: ImageFormat) -> str:
    """Return the name of an image's file in the folder of images.

    Raises:
        ValueError: that is no checksum or no format; so a row's own words never become a path.
    """
    if not _SHA256.fullmatch(sha256) or image_format not in SUFFIXES:
        raise ValueError(f"{sha256!r} ({image_format!r}) is not an image of the canonical form")
    return f"{sha256}.{SUFFIXES[image_format]}"


def image_part(value: object) -> ImagePart | None:
    """Return a value as the canonical part; None if it has another form."""
    if not isinstance(value, Mapping) or value.get("type") != "image" or set(value) != _KEYS:
        return None
    sha256, sides = value["sha256"], (value["width"], value["height"])
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256) or value["format"] not in IMAGE_FORMATS:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return cast("ImagePart", dict(value))


def images_of(content: object) -> list[ImagePart]:
    """Return the images of a canonical message's content, in order."""
    if not isinstance(content, list):
        return []
    return [cast("ImagePart", part) for part in content if part["type"] == "image"]


def words_of(content: Content) -> str:
    """Return the text of a message's content, without its images."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def images_in(row: Mapping[str, object]) -> list[ImagePart]:
    """Return the images of a canonical row, in order."""
    lists = [row[key] for key in ("messages", "prompt", "chosen", "rejected") if key in row]
    messages = [each for said in cast("Sequence[Sequence[Mapping[str, object]]]", lists) for each in said]
    return [part for message in messages for part in images_of(message["content"])]
