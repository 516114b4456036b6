"""The bytes of an image's file -> its format and size, or why no job takes it. Nothing is decoded.

Own readers of the structure, from the specifications: PNG (W3C, third edition: chunks with their checksums up to IEND),
JPEG (ITU T.81: markers from SOI over SOF to EOI), and WebP (RFC 9649: the chunks of a RIFF file). So a server needs no
library that decodes images, and a small file that unpacks to a huge image is refused by what its header says.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from llama_stack_provider_moe.spec.rows.images import ImageFormat, ImageLimits, ImagePart

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_COLOURS_AT: Final = 25  # in a PNG: its kind of colours
_OF_PALETTE: Final = 3
# Pieces of other files that people take for images, and their names.
_OTHERS: Final = (
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM.{12}", re.DOTALL), "BMP"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb".{4}ftyp(?:hei|mif)", re.DOTALL), "HEIC"),
    (re.compile(rb"%PDF-"), "PDF"),
    (re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|!DOCTYPE|!--|svg)", re.IGNORECASE), "SVG, a drawing and not pixels"),
)
_EXPECTED: Final = "expected PNG, JPEG or WebP"
# A marker in a JPEG's compressed data: neither a stuffed zero, a restart, nor a fill byte.
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PLAIN_FRAMES: Final = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; all of Huffman codes
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length


class BadImage(Exception):
    """Why no job takes an image; the text continues "is an image ..." or names the file's problem itself."""


class Header(NamedTuple):
    """What a file's header says; sides in pixels."""

    format: ImageFormat
    width: int
    height: int


def read_image(content: bytes, limits: ImageLimits) -> ImagePart:
    """Return the canonical part of an image.

    Args:
        content: the whole file.
        limits: of the server.

    Raises:
        BadImage: it is no whole file of a format that jobs take, or too large.
    """
    if len(content) > limits.max_bytes:
        raise too_large(limits)
    found = header(content)
    if found.width == 0 or found.height == 0:
        raise BadImage(f"is an image of {found.width} x {found.height} pixels; expected at least one")
    if found.width * found.height > limits.max_pixels:
        raise BadImage(
            f"is an image of {found.width:,} x {found.height:,} pixels; expected at most {limits.max_pixels:,} in all "
            "(`images.max_pixels` of this server)"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return {"type": "image", "sha256": sha256, "format": found.format, "width": found.width, "height": found.height}


def too_large(limits: ImageLimits) -> BadImage:
    """Return the error of a file with too many bytes."""
    return BadImage(f"is an image of more than {limits.max_bytes:,} bytes (`images.max_bytes` of this server)")


def header(content: bytes) -> Header:
    """Return what the header of a whole file says.

    Raises:
        BadImage: the file has another format, is cut short or damaged, or moves.
    """
    try:
        if content.startswith(_PNG):
            return _png(content)
        if content.startswith(b"\xff\xd8"):
            return _jpeg(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _webp(content)
    except (struct.error, IndexError):
        raise BadImage("is an image whose file is cut short") from None
    if not content:
        raise BadImage(f"is an empty file; {_EXPECTED}")
    other = next((name for begin, name in _OTHERS if begin.match(content)), None)
    raise BadImage(f"is {other}; {_EXPECTED}" if other else f"has no signature of an image; {_EXPECTED}")


def _png(content: bytes) -> Header:
    found: Header | None = None
    has_data = has_palette = False
    at = len(_PNG)
    while True:
        size, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + size
        if end > len(content):
            raise BadImage("is a PNG image whose file is cut short")
        if zlib.crc32(memoryview(content)[at + 4 : end - 4]) != struct.unpack_from(">I", content, end - 4)[0]:
            raise BadImage(f"is a PNG image with damage: chunk {_shown(kind)} has another checksum than it says")
        if found is None:
            found = _png_header(content, kind, size, at + 8)
        elif kind == b"acTL":
            raise BadImage("is an animated PNG image; expected one that stands still")
        elif kind == b"PLTE":
            has_palette = True
        elif kind == b"IDAT":
            if content[_COLOURS_AT] == _OF_PALETTE and not has_palette:
                raise BadImage("is a PNG image with damage: its colours are those of a palette, and it has none (PLTE)")
            has_data = True
        elif kind == b"IEND":
            if not has_data:
                raise BadImage("is a PNG image without data (no IDAT chunk)")
            if end != len(content):
                raise BadImage(f"is a PNG image with {len(content) - end:,} bytes behind its end")
            return found
        elif not kind[0] & 0x20:  # a capital letter: nobody can show it without that chunk
            raise BadImage(f"is a PNG image with a chunk of unknown meaning, {_shown(kind)}")
        at = end


def _png_header(content: bytes, kind: bytes, size: int, at: int) -> Header:
    if kind != b"IHDR" or size != 13:
        raise BadImage("is a PNG image that does not begin with its header (IHDR)")
    width, height, depth, colours, *methods = struct.unpack_from(">IIBBBBB", content, at)
    if depth not in (1, 2, 4, 8, 16) or colours not in (0, 2, 3, 4, 6) or methods[:2] != [0, 0] or methods[2] > 1:
        raise BadImage("is a PNG image whose header (IHDR) no PNG can have")
    return Header("png", width, height)


def _jpeg(content: bytes) -> Header:
    found: Header | None = None
    at, has_scan = 2, False
    while True:
        if content[at] != 0xFF:
            raise BadImage(f"is a JPEG image with damage: no marker at byte {at:,}")
        while content[at] == 0xFF:  # any number of fill bytes
            at += 1
        marker = content[at]
        at += 1
        if marker == 0xD9:
            if found is None or not has_scan:
                raise BadImage("is a JPEG image without data (no frame with a scan before its end)")
            return found  # cameras write more behind the end
        if marker in _ALONE:
            continue
        (size,) = struct.unpack_from(">H", content, at)
        if size < 2:
            raise BadImage(f"is a JPEG image with damage: a segment of {size} bytes")
        if marker in _FRAMES:
            if found is not None:
                raise BadImage("is a JPEG image of several frames; expected one")
            found = _frame(content, marker, at + 2)
        at += size
        if marker == 0xDA:
            has_scan = True
            following = _MARKER.search(content, at)
            if following is None:
                raise BadImage("is a JPEG image whose file is cut short")
            at = following.start()


def _frame(content: bytes, marker: int, at: int) -> Header:
    if marker not in _PLAIN_FRAMES:
        raise BadImage(f"is a JPEG image of a rare kind (SOF{marker - 0xC0}); expected baseline or progressive")
    depth, height, width, parts = struct.unpack_from(">BHHB", content, at)
    if depth != 8 or parts not in (1, 3, 4):
        raise BadImage(f"is a JPEG image of {parts} colours with {depth} bits; expected 1, 3 or 4 with 8 bits")
    return Header("jpeg", width, height)


def _webp(content: bytes) -> Header:
    (size,) = struct.unpack_from("<I", content, 4)
    if size + 8 > len(content):
        raise BadImage("is a WebP image whose file is cut short")
    if size + 8 < len(content):
        raise BadImage(f"is a WebP image with {len(content) - size - 8:,} bytes behind its end")
    canvas: tuple[int, int] | None = None
    data: tuple[int, int] | None = None
    for number, (kind, at) in enumerate(_chunks(content)):
        if kind in (b"ANIM", b"ANMF") or (kind == b"VP8X" and content[at] & 0x02):
            raise BadImage("is an animated WebP image; expected one that stands still")
        if kind == b"VP8X" and number == 0:
            low, high, low_2, high_2 = struct.unpack_from("<HBHB", content, at + 4)
            canvas = (low + (high << 16) + 1, low_2 + (high_2 << 16) + 1)
        elif kind in (b"VP8 ", b"VP8L") and data is None:
            data = _vp8(content, at) if kind == b"VP8 " else _vp8l(content, at)
        elif number == 0:
            raise BadImage(f"is a WebP image that begins with chunk {_shown(kind)}; expected VP8, VP8L or VP8X")
    if data is None:
        raise BadImage("is a WebP image without data (no VP8 or VP8L chunk)")
    if canvas not in (None, data):
        raise BadImage(f"is a WebP image whose header has {canvas} pixels, and its data {data}")
    return Header("webp", *data)


def _chunks(content: bytes) -> Iterator[tuple[bytes, int]]:
    at = 12
    while at < len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        end = at + 8 + size + size % 2
        if end > len(content):
            raise BadImage(f"is a WebP image with damage: chunk {_shown(kind)} is longer than its file")
        yield kind, at + 8
        at = end


def _vp8(content: bytes, at: int) -> tuple[int, int]:
    first, start, width, height = struct.unpack_from("<B2x3sHH", content, at)
    if first & 1 or start != b"\x9d\x01\x2a":
        raise BadImage("is a WebP image with damage: its data begins with no key frame")
    return width & 0x3FFF, height & 0x3FFF


def _vp8l(content: bytes, at: int) -> tuple[int, int]:
    signature, bits = struct.unpack_from("<BI", content, at)
    if signature != 0x2F:
        raise BadImage("is a WebP image with damage: its lossless data has no signature")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _shown(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))
