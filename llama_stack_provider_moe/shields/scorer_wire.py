"""The language of a server and its scorer process: JSON objects over a Unix socket, each after its length.

    server: {"score": {"probe": ..., "conversations": [[{"role": ..., "content": ...}]], "deadline_s": ...}}
    scorer: {"scores": [[probability, threshold, layer], ...]}            one for each conversation
    scorer: {"failed": reason, "message": ...}                            see `ScorerFailed`
    server: {"ping": true}
    scorer: {"probes": [...], "refused": {name: why}, "waiting": ...}     said by the thread that scores

A connection carries one request and its answer. A server that closes it no longer wants the answer. Nothing is pickled.
The socket is in a folder of the state folder that only the server's user may enter.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from llama_stack_provider_moe.shields.scorer_settings import ScorerSettings
from llama_stack_provider_moe.shields.scores import FailureReason
from llama_stack_provider_moe.spec.blocks import Block

SOCKET_NAME = "scorer.sock"
MOST_BYTES = 2 << 20
MOST_CONVERSATIONS = 256  # of one request
_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


class ScoreRequest(Block):
    """Conversations to score."""

    probe: Annotated[str, Field(max_length=64)]
    conversations: list[list[dict[str, str]]] = Field(min_length=1, max_length=MOST_CONVERSATIONS)
    deadline_s: Annotated[float, Field(gt=0, le=3600)]


class Request(Block):
    """One of the two requests."""

    score: ScoreRequest | None = None
    ping: Literal[True] | None = None


class Answer(Block):
    """One of the three answers."""

    scores: list[tuple[float, float, int]] | None = None
    failed: FailureReason | None = None
    message: str = ""
    probes: list[str] | None = None
    refused: dict[str, str] = Field(default_factory=dict)
    waiting: int = 0


class Start(Block):
    """What a scorer process reads from its standard input, as one line; it ends when that input does."""

    folder: str
    settings: ScorerSettings


class WireError(ValueError):
    """What came is not of this language."""


def frame(message: Block) -> bytes:
    """A message with its length before it.

    Raises:
        WireError: it is longer than MOST_BYTES.
    """
    content = message.model_dump_json(exclude_none=True).encode()
    if len(content) > MOST_BYTES:
        raise WireError(f"a message of {len(content):,} bytes; expected at most {MOST_BYTES:,}")
    return _LENGTH.pack(len(content)) + content


def length_of(head: bytes) -> int:
    """The length that stands before a message.

    Raises:
        WireError: it is 0, or more than MOST_BYTES.
    """
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= MOST_BYTES:
        raise WireError(f"a message of {length:,} bytes; expected 1 to {MOST_BYTES:,}")
    return int(length)


def read_as[Kind: Block](kind: type[Kind], content: bytes) -> Kind:
    """A message.

    Raises:
        WireError: it is none of that kind.
    """
    try:
        return kind.model_validate(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{kind.__name__}: {str(error)[:300]}") from None


def plain(conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[list[dict[str, str]]]:
    """Conversations with role and content of each message alone."""
    return [
        [{name: message[name] for name in ("role", "content") if name in message} for message in messages]
        for messages in conversations
    ]


@contextmanager
def socket_in(folder: Path) -> Iterator[str]:
    """A path of the scorer's socket that is short enough for one, however long the folder's is (108 bytes, unix(7))."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)
