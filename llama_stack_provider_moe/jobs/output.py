"""What a training process printed: read in bounded pieces, and made harmless to print."""

import re
from pathlib import Path

# C0 and C1 control characters without tab and newline, and what reorders or hides text on a screen (bidirectional
# controls, line and paragraph separators, byte order mark).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Whole sequences that a terminal obeys: CSI (colours, cursor); OSC (title, links, clipboard), DCS, SOS, PM and APC,
# each up to its BEL or ST; then the two-character ones. A string without an end is left in: it would hide the rest.
_ESCAPES = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]P^_X]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\\\|\x9c)"
    "|\x1b[ -/]*[0-~]"
)


def printable(text: str) -> str:
    """`text` with terminal sequences taken out, and other control characters shown as U+FFFD.

    A carriage return that repaints a line, as progress bars do, becomes a new line.
    """
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return _UNPRINTABLE.sub("\ufffd", text)


def tail(path: Path, limit_bytes: int = 64 * 1024) -> str:
    """The last whole lines of a file that fit into `limit_bytes`, printable; '' for a file that is not there.

    Reads at most `limit_bytes`, whatever the size of the file. One line longer than that is given from its middle on.
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
