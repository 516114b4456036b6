"""Gzipped text, decompressed piece by piece as it arrives."""

import zlib
from collections.abc import Iterator

from llama_stack_provider_moe.errors import InvalidInput

GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 256 << 10


class Gunzip:
    """Decompresses one file; its caller feeds the bytes.

    Args:
        name: the file's name for error texts.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._member = zlib.decompressobj(31)
        self._has_begun = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the text in pieces, so that a small piece which becomes a large one needs little memory.

        Raises:
            InvalidInput: the bytes are not those of a gzip file.
        """
        while piece:
            if self._member.eof:  # a file may have several members, as `cat a.gz b.gz` makes it
                piece = piece.lstrip(b"\0")  # some programs pad the end
                if piece:
                    self._member = zlib.decompressobj(31)
                continue
            self._has_begun = True
            try:
                text = self._member.decompress(piece, _PIECE_BYTES)
            except zlib.error as error:
                raise InvalidInput("rows", self._name, f"a gzip file; this one is damaged ({error})") from None
            piece = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if text:
                yield text

    def finish(self) -> None:
        """Check that the file did not end in the middle.

        Raises:
            InvalidInput: it did.
        """
        if self._has_begun and not self._member.eof:
            raise InvalidInput("rows", self._name, "a whole gzip file; this one ends in the middle")
