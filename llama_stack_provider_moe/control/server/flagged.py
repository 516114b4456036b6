"""Flagged conversations that shields keep -> versions of data sets, and rows of jobs.

    POST feedback           a version of a data set of them
    GET, DELETE feedback    the caller's own: how many there are; delete them
    data.dataset_id         feedback:all, feedback:answered

Each caller reaches their own. An administrator can make a data set of everybody's.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import get_args

from llama_stack_provider_moe.control.server import callers
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.wire_datasets import ErasedFeedback, FeedbackBody, KeptFeedback
from llama_stack_provider_moe.control.store import feedback_files
from llama_stack_provider_moe.control.store.feedback_files import Only
from llama_stack_provider_moe.control.store.owners import is_one_user
from llama_stack_provider_moe.errors import Forbidden, InvalidInput, NotFound
from llama_stack_provider_moe.spec.feedback_config import FeedbackFolder
from llama_stack_provider_moe.spec.row_files import loaded_row

PREFIX = "feedback:"
CHOICES: tuple[Only, ...] = get_args(Only)
_reading = Pool("moe-flagged", 2, 64, "flagged conversations")


class FlaggedRows:
    """The rows that a job reads.

    Args:
        lines: makes their iterator, anew for each reading.

    Attributes:
        sha256: of the rows that were read last.
    """

    def __init__(self, lines: Callable[[], Iterator[bytes]]) -> None:
        self._lines = lines
        self.sha256 = ""

    async def pages(self, rows_per_page: int) -> AsyncIterator[list[object]]:
        """Yield the rows in pages."""
        digest = hashlib.sha256()
        pieces = self._lines()
        while (piece := await _reading.run(_next, pieces)) is not None:
            digest.update(piece)
            rows = [loaded_row(line) for line in piece.splitlines(keepends=True)]
            for at in range(0, len(rows), rows_per_page):
                yield rows[at : at + rows_per_page]
        self.sha256 = digest.hexdigest()


class Flagged:
    """The flagged conversations that one service may read.

    Args:
        config: where they are; None: this server makes no use of any.
    """

    def __init__(self, config: FeedbackFolder | None) -> None:
        self._config = config if config is not None and config.consent else None

    async def kept(self, owner: str) -> KeptFeedback:
        """Return how much is kept of an owner."""
        found = await _reading.run(feedback_files.kept, self._folder.folder, owner)
        return KeptFeedback(rows=found.rows, answered=found.answered, bytes=found.bytes, left_out=found.left_out)

    async def erase(self, owner: str) -> ErasedFeedback:
        """Delete what is kept of an owner; data sets and jobs keep their copies."""
        return ErasedFeedback(bytes=await _reading.run(feedback_files.erase, self._folder.folder, owner))

    async def body(self, owner: str, whose: str | None, asked: FeedbackBody) -> AsyncIterator[bytes]:
        """Return the chosen rows as the body of an upload.

        Args:
            owner: the caller.
            whose: the owner whose jobs the caller may read; None for every owner's.
            asked: which rows.

        Raises:
            Forbidden: the caller asks for everybody's, and is no administrator.
            NotFound: there are no such rows.
        """
        if asked.everybody and whose is not None and is_one_user(whose) and owner != callers.ANONYMOUS:
            raise Forbidden("everybody's flagged conversations are for administrators; leave out `everybody`")
        chosen = whose if asked.everybody else owner
        pieces = feedback_files.pieces(self._folder.folder, chosen, asked.only, asked.shield)
        first = await _reading.run(_next, pieces)
        if first is None:
            which = " that end with an answer" if asked.only == "answered" else ""
            by = "" if asked.shield is None else f" of shield {asked.shield!r}"
            who = "nobody has" if asked.everybody else "you have no"
            raise NotFound(f"{who} flagged conversations{which}{by}")
        return _body(first, pieces)

    def rows(self, owner: str, dataset_id: str, field: str) -> FlaggedRows:
        """Return the rows that a job names as its data set.

        Args:
            owner: the caller.
            dataset_id: as the caller wrote it, with `PREFIX`.
            field: the caller's name for the field.

        Raises:
            InvalidInput: it names no such rows.
            Forbidden: this server makes no use of flagged conversations.
        """
        only = dataset_id.removeprefix(PREFIX)
        if only not in CHOICES:
            raise InvalidInput(field, dataset_id, f"one of {', '.join(PREFIX + each for each in CHOICES)}")
        return FlaggedRows(partial(feedback_files.pieces, self._folder.folder, owner, only))

    @property
    def _folder(self) -> FeedbackFolder:
        if self._config is None:
            raise Forbidden("this server makes no use of flagged conversations (`feedback` of its configuration)")
        return self._config


async def _body(first: bytes, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    while (piece := await _reading.run(_next, pieces)) is not None:
        yield piece


def _next(pieces: Iterator[bytes]) -> bytes | None:
    return next(pieces, None)
