"""The output of a training process: limit its size, read its end, and make it safe to print."""

import os
import re
from pathlib import Path

# C0 and C1 control characters except tab and newline, and characters that reorder or hide text on a screen
# (bidirectional controls, line and paragraph separators, byte order mark).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Complete terminal sequences: CSI (colours, cursor); OSC (title, links, clipboard), DCS, SOS, PM and APC, each up to
# its BEL or ST; then two-character sequences. An unterminated one is kept, because removing it would hide the rest.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]P^_X]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\\\|\x9c)"
    "|\x1b[ -/]*[0-~]"
)


# The supervisor holds this much of a file at a time.
_TAIL_LIMIT_BYTES = 8 << 20


def printable(text: str) -> str:
    """Return `text` without terminal sequences, and with other control characters replaced by U+FFFD.

    A carriage return that redraws a line, as progress bars do, becomes a newline.
    """
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return _UNPRINTABLE.sub("\ufffd", text)


def tail(path: Path, limit_bytes: int = 64 * 1024) -> str:
    """Return the last complete lines of a file that fit into `limit_bytes`, printable; '' if there is no file.

    It reads at most `limit_bytes`, whatever the size of the file. If the last line is longer, only its end is returned.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return ""
    with file:
        size = file.seek(0, 2)
        start = max(0, size - limit_bytes)
        file.seek(start)
        block = file.read(limit_bytes)
    if start:
        first_line_end = block.find(b"\n")
        if 0 <= first_line_end < len(block) - 1:
            block = block[first_line_end + 1 :]
    return printable(block.decode("utf-8", errors="replace"))


def bound(path: Path, limit_bytes: int) -> bool:
    """Remove the middle of a file that is larger than `limit_bytes`, with a note in its place; return whether it was.

    The beginning and the end stay, each about a quarter of the limit (the end 8 MiB at most). The process that appends
    to the file can continue; a line that it prints at that moment may be lost.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return False
    try:
        size, keep = os.fstat(descriptor).st_size, limit_bytes // 4
        block = os.pread(descriptor, min(keep, _TAIL_LIMIT_BYTES), max(0, keep - _TAIL_LIMIT_BYTES))
        head = keep - len(block) + (block.rfind(b"\n") + 1 or len(block))
        tail_bytes = min(keep, _TAIL_LIMIT_BYTES)
        end = os.pread(descriptor, tail_bytes, size - tail_bytes)
        end = end[end.find(b"\n") + 1 :]
        note = f"\n[{size - head - len(end)} bytes of output were removed here: it had more than {limit_bytes}]\n"
        os.ftruncate(descriptor, head)
        os.write(descriptor, note.encode() + end)
        return True
    finally:
        os.close(descriptor)
