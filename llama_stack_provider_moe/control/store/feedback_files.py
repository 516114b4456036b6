"""The files of flagged conversations, one for each owner: shields append to them, and data sets are made of them.

FOLDER/owners/
  anonymous.jsonl          of a server without authentication
  <owner>.jsonl            of a user, by the name in the store (a hash)
  <tenant>/<owner>.jsonl   of a user of a tenant

A line is a row as a job takes it, with the shield that flagged it and the time: {"at", "shield", "messages"}. A row
that was appended is on the disk. What a job could not take, such as a tool call that is not JSON, stays there and is
left out of the rows. Several processes may append: each holds the file's lock. What a process that died has
written of a line goes with the next append.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from llama_stack_provider_moe.control.store.owners import is_one_user
from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.ground.private import Privacy
from llama_stack_provider_moe.spec.rows import canonical

Outcome = Literal["kept", "full"]
Only = Literal["all", "answered"]
OWNERS = "owners"
_OWNER = re.compile(r"anonymous|[0-9a-f]{64}(/[0-9a-f]{64})?")
_SUFFIX = ".jsonl"
_LOOK_BYTES = 1 << 16
_PIECE_BYTES = 256 << 10


class Kept(NamedTuple):
    """What is kept of an owner.

    Attributes:
        rows: number of flagged conversations; equal ones count once.
        answered: number of those that end with an answer of the assistant.
        bytes: size of the file.
        left_out: number of further ones that no job could take.
    """

    rows: int
    answered: int
    bytes: int
    left_out: int = 0


class _Row(NamedTuple):
    is_answered: bool
    is_usable: bool  # whether a job could take it
    line: bytes  # the messages alone


def path_of(folder: Path, owner: str) -> Path:
    """Return the file of an owner."""
    assert _OWNER.fullmatch(owner), owner  # a name in the store, never what a caller wrote
    return folder / OWNERS / f"{owner}{_SUFFIX}"


def append(folder: Path, owner: str, line: bytes, most_bytes: int) -> Outcome:
    """Append a line to an owner's file, unless the file would become larger than `most_bytes`.

    Args:
        folder: of all owners.
        owner: whose conversation it is.
        line: the row, with its newline.
        most_bytes: largest size of the file.

    Raises:
        OSError: the disk is full, or the folder is gone; nothing of the line stays.
    """
    path = path_of(folder, owner)
    Privacy().make_folder(path.parent)
    with open(path, "a+b", buffering=0, opener=Privacy().opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = _mended(file)
        if size + len(line) > most_bytes:
            return "full"
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(None, f"only {written} of {len(line)} bytes were written")
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    return "kept"


def used_bytes(folder: Path) -> int:
    """Return the size of all owners' files."""
    return sum(path.stat().st_size for path in (folder / OWNERS).rglob(f"*{_SUFFIX}"))


def erase(folder: Path, owner: str) -> int:
    """Delete what is kept of an owner; return its size."""
    try:
        with path_of(folder, owner).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file.fileno()).st_size
            file.truncate(0)  # not unlinked: a process that waits for the lock would append to a deleted file
            os.fsync(file.fileno())
            return size
    except FileNotFoundError:
        return 0


def kept(folder: Path, owner: str) -> Kept:
    """Return how much is kept of an owner."""
    path = path_of(folder, owner)
    rows = answered = left_out = 0
    for row in _rows([path], "all", None):
        if row.is_usable:
            rows, answered = rows + 1, answered + row.is_answered
        else:
            left_out += 1
    return Kept(rows, answered, path.stat().st_size if path.exists() else 0, left_out)


def pieces(folder: Path, whose: str | None, only: Only, shield: str | None = None) -> Iterator[bytes]:
    """Yield rows as JSON Lines, in pieces: those that are there now, each once, of one owner after the other.

    One that a job could not take would end the job for all others, so it is left out; `kept` counts these.

    Args:
        folder: of all owners.
        whose: an owner, every user of a tenant (`owners.everybody_of`), or None for every owner.
        only: those that end with an answer, or all.
        shield: only those that this shield flagged; None: any.
    """
    lines, size = [], 0
    for row in _rows(_files(folder, whose), only, shield):
        if not row.is_usable:
            continue
        lines.append(row.line)
        size += len(row.line)
        if size >= _PIECE_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _files(folder: Path, whose: str | None) -> list[Path]:
    if whose is not None and is_one_user(whose):
        return [path_of(folder, whose)]
    tenant = "" if whose is None else whose.removesuffix("*")
    return sorted((folder / OWNERS / tenant).rglob(f"*{_SUFFIX}"))


def _rows(paths: list[Path], only: Only, shield: str | None) -> Iterator[_Row]:
    """The chosen rows of these files, each once, whichever shields flagged it."""
    seen: set[bytes] = set()
    for path in paths:
        with _readable(path) as file:
            for line in file:
                try:
                    row = json.loads(line)
                    messages, by = row["messages"], row["shield"]
                    is_answered = messages[-1]["role"] == "assistant"
                except (ValueError, LookupError, TypeError):  # damaged on the disk; the others are still rows
                    continue
                if (shield is not None and by != shield) or (only == "answered" and not is_answered):
                    continue
                text = json.dumps({"messages": messages}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
                digest = hashlib.blake2b(text, digest_size=12).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield _Row(is_answered, _is_usable(messages), text)


def _is_usable(messages: object) -> bool:
    row = canonical({"messages": messages}, 1, "circuit_breaker", "messages", answered=False)
    return not isinstance(row, RowProblem)


@contextmanager
def _readable(path: Path) -> Iterator[Iterator[bytes]]:
    """Whole lines of a file that are there now, whoever appends meanwhile; none of a file that does not exist."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield iter(())
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        yield _lines(file, size)


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    while file.tell() < size and (line := file.readline(size - file.tell())).endswith(b"\n"):
        yield line


def _mended(file: BinaryIO) -> int:
    """Cut what is left of a line that a process has not finished; return the size."""
    handle = file.fileno()
    size = end = os.fstat(handle).st_size
    while end:
        begin = max(0, end - _LOOK_BYTES)
        found = os.pread(handle, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end != size:
        os.ftruncate(handle, end)
    return end
