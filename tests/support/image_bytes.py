"""Small images, made by hand: each is a whole file that its readers accept, or one with a known fault."""

import base64
import struct
import zlib
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int = 2, height: int = 2, colour: int = 0, *, extra: bytes = b"", rows: int | None = None) -> bytes:
    """A PNG of one colour; `extra` are chunks before its data, `rows` the rows that its data has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    line = b"\0" + bytes([colour % 256, colour // 256 % 256, colour // 65536 % 256]) * width
    data = zlib.compress(line * (height if rows is None else rows))
    return SIGNATURE + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND")


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(width: int = 3, height: int = 2, frame: int = 0xC0, *, end: bytes = b"\xff\xd9") -> bytes:
    """The structure of a JPEG; no decoder would show its data."""
    header = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    scan = segment(0xDA, b"\1\1\0\0\x3f\0") + b"\x12\xff\0\x34\xff\xd0\x56"
    return b"\xff\xd8" + segment(0xE0, b"JFIF\0") + segment(frame, header) + scan + end


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless(width: int = 4, height: int = 3) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0"


def webp(width: int = 4, height: int = 3) -> bytes:
    return riff(lossless(width, height))


def url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def part(content: bytes | str = b"", kind: str = "png") -> dict[str, Any]:
    given = content if isinstance(content, str) else url(content or png(), kind)
    return {"type": "image_url", "image_url": {"url": given}}


def asked(*parts: Any, text: str = "What is it?", answer: str = "A square.") -> dict[str, Any]:
    """A row that asks about images."""
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
            {"role": "assistant", "content": answer},
        ]
    }
