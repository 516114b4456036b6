"""The prompts to a playground and their answers: files in the folder `prompts` of its job.

    000017.json     a prompt                                              written by the server
    000017.stop     asks for the end of its answer                        written by the server
    000017.jsonl    its answer, a line for each piece                     written by the training process
    000017.taken    the highest number so far, also of a withdrawn prompt written by the server
    model.json      what the loaded model has                             written by the training process
    wanted          asks for room for another job                         written by the supervisor
    closed          says that the job takes no more prompts               written by the training process

A number belongs to one prompt for ever, also after the prompt was withdrawn: an old page or client that asks for its
number must not get the prompt of somebody else.
"""

import os
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, TypeAdapter, ValidationError

from llama_stack_provider_moe.errors import InvalidFile
from llama_stack_provider_moe.ground.small_files import open_regular, read_small
from llama_stack_provider_moe.jobdir.attempt import require_current
from llama_stack_provider_moe.jobdir.reading import read_as, read_with
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.playground import KEPT_PROMPTS, AdapterSide, PromptRequest

WINDOW_BYTES = 1 << 20  # of an answer, in one read
LIMIT_BYTES = 64 << 20  # of an answer; the limits of a prompt keep it far below
PROMPT_BYTES = 128 << 20  # of a prompt's file, in which a character may take 6 bytes
END_BYTES = 1 << 16  # longer than the last line of an answer
_NUMBER = re.compile(r"(\d{6,9})\.json")
_TAKEN = re.compile(r"(\d{6,9})\.taken")
EndReason = Literal["stop", "length", "positions", "stopped"]


class LoadedModel(Block):
    """What the model of a playground has."""

    has_adapter: bool = Field(description="Whether there is an adapter, which a prompt can switch off.")
    moe_layers: list[int] = Field(description="Layers with experts; empty for a dense model.")
    experts: int = Field(description="Number of a layer's experts; 0 for a dense model.")
    top_k: int = Field(description="Number of experts that a token gets in a layer; 0 for a dense model.")
    positions: int | None = Field(
        default=None,  # files of earlier versions have none
        description="Largest number of tokens of a prompt with its answer; null if the model has no limit.",
    )


class Begun(Block):
    """One side's answer begins."""

    type: Literal["begun"] = "begun"
    side: AdapterSide = Field(description="Whether the adapter is on or off.")
    prompt_tokens: int = Field(description="Number of tokens of the prompt.")


class Text(Block):
    """More text of an answer."""

    type: Literal["text"] = "text"
    side: AdapterSide = Field(description="Whether the adapter is on or off.")
    text: str = Field(description="What follows the text so far.")


class Routed(Block):
    """The experts that made one token of an answer: those of the position that the token was chosen at."""

    type: Literal["routed"] = "routed"
    side: AdapterSide = Field(description="Whether the adapter is on or off.")
    id: int = Field(description="Id of the token.")
    token: str = Field(description="The token as text.")
    experts: list[list[int]] = Field(description="The chosen experts of each MoE layer, in the order of the layers.")
    weights: list[list[float]] = Field(description="The router's score of each chosen expert, to 3 digits.")


class Answered(Block):
    """One side's answer has ended."""

    type: Literal["answered"] = "answered"
    side: AdapterSide = Field(description="Whether the adapter is on or off.")
    text: str = Field(description="All of the answer, without special tokens.")
    tokens: int = Field(description="Number of its tokens, with the one that ended it.")
    reason: EndReason = Field(
        description="stop: the model ended it; length: it reached max_tokens; positions: it reached the model's last "
        "position; stopped: somebody stopped it."
    )
    seconds: float = Field(description="How long it took.")


class Ended(Block):
    """Everything that was asked for has been answered, or can't be."""

    type: Literal["ended"] = "ended"
    error: str | None = Field(default=None, max_length=2000, description="Why there is no answer, or not all of it.")


Piece = Annotated[Begun | Text | Routed | Answered | Ended, Discriminator("type")]
_PIECE: TypeAdapter[Piece] = TypeAdapter(Piece)


class PromptFiles:
    """The files of one playground.

    Args:
        folder: `JobFolder.prompts`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.json"
        self.closed = folder / "closed"
        self.wanted = folder / "wanted"

    def prompt(self, number: int) -> Path:
        """Return the file of a prompt."""
        return self.folder / f"{number:06d}.json"

    def stop(self, number: int) -> Path:
        """Return the file that asks for the end of an answer."""
        return self.folder / f"{number:06d}.stop"

    def answer(self, number: int) -> Path:
        """Return the file of an answer."""
        return self.folder / f"{number:06d}.jsonl"

    def numbers(self) -> list[int]:
        """Return the numbers of the prompts that are there, ascending."""
        return self._numbers_of(_NUMBER)

    def _numbers_of(self, names: re.Pattern[str]) -> list[int]:
        try:
            found = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in found if (match := names.fullmatch(name)))

    def read_prompt(self, number: int) -> PromptRequest:
        """Read a prompt.

        Raises:
            FileNotFoundError: There is none of this number.
            ValueError: It is damaged.
        """
        return read_as(PromptRequest, read_small(self.prompt(number), PROMPT_BYTES))

    def read_model(self) -> LoadedModel | None:
        """Read what the loaded model has; None before it is loaded, or if the file is damaged."""
        try:
            return read_as(LoadedModel, read_small(self.model))
        except (FileNotFoundError, ValueError):
            return None

    def add(self, asked: PromptRequest, mode: int) -> int:
        """Write a prompt under a number that none had before; return the number.

        Args:
            asked: The prompt.
            mode: Mode of the file.
        """
        written = self.folder / f".{uuid.uuid4().hex}"
        handle = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(asked.model_dump_json())
                file.flush()
                os.fsync(file.fileno())
            while True:
                number = self._take_number(mode)
                # An earlier version makes the prompt's file without a mark.
                with suppress(FileExistsError):
                    os.link(written, self.prompt(number))
                    return number
        finally:
            os.unlink(written)

    def _take_number(self, mode: int) -> int:
        """Return a number that no prompt had, and remove the marks of lower ones.

        Several servers may do this at once. The highest mark stays until there is a higher one, so whoever finds no
        higher mark after making its own is the first with this number.
        """
        number = max([0, *self.numbers(), *self._numbers_of(_TAKEN)]) + 1
        while True:
            with suppress(FileExistsError):
                os.close(os.open(self._taken(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
                marks = self._numbers_of(_TAKEN)
                if marks[-1] == number:
                    for lower in marks[:-1]:
                        self._taken(lower).unlink(missing_ok=True)
                    return number
            number += 1

    def _taken(self, number: int) -> Path:
        return self.folder / f"{number:06d}.taken"

    def ask_for_room(self, is_wanted: bool) -> bool:
        """Ask the playground to make room for another job, or take that back; return whether it changes anything.

        Raises:
            FileNotFoundError: There is no folder.
        """
        if self.wanted.exists() == is_wanted or self.folder.is_symlink():
            return False
        if is_wanted:
            os.close(os.open(self.wanted, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        else:
            self.wanted.unlink()
        return True

    def waiting(self) -> list[int]:
        """Return the prompts whose answers have not begun, ascending."""
        return [number for number in self.numbers() if not self.answer(number).exists()]

    def is_answered(self, number: int) -> bool:
        """Return whether an answer is complete; reads only its end."""
        return self._last_line(self.answer(number)).startswith(b'{"type":"ended"')

    @staticmethod
    def _last_line(path: Path) -> bytes:
        try:
            with open_regular(path) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
                content = file.read()
        except FileNotFoundError:
            return b""
        # The newline comes last, so a line without one is not complete.
        return content[:-1].rpartition(b"\n")[2] if content.endswith(b"\n") else b""

    def has_failed(self, number: int) -> bool:
        """Return whether a complete answer ended with an error."""
        return not self._last_line(self.answer(number)).endswith(b'"error":null}')

    def withdraw(self, number: int) -> None:
        """Remove a prompt and what belongs to it; the answer last, so that nobody takes it for a prompt that waits."""
        for path in (self.prompt(number), self.stop(number), self.answer(number)):
            with suppress(FileNotFoundError):
                path.unlink()

    def forget_old(self) -> None:
        """Remove the answered prompts beyond the last `KEPT_PROMPTS`."""
        for number in self.numbers()[:-KEPT_PROMPTS]:
            if self.answer(number).exists():
                self.withdraw(number)


def pieces_from(path: Path, start: int) -> tuple[list[Piece], int]:
    """Return the complete pieces of an answer from byte `start` on, at most a window of them, and the byte after them.

    A missing file has none. A line that can't be read is left out: a disk may have filled up while it was written.

    Raises:
        InvalidFile: It is not a regular file.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            content = file.read(WINDOW_BYTES)
    except FileNotFoundError:
        return [], start
    except OSError as error:
        raise InvalidFile(path, f"can't be read ({error.strerror})") from None
    end = content.rfind(b"\n") + 1
    found: list[Piece] = []
    for line in content[:end].splitlines():
        with suppress(ValidationError):
            found.append(read_with(_PIECE, line))
    return found, start + end


class AnswerLog:
    """Writes the answer of one prompt. If an earlier process left an incomplete line, a newline is added first.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        require_current()
        self._file = path.open("a+b", buffering=0)
        self._bytes = self._file.seek(0, os.SEEK_END)
        if self._bytes and os.pread(self._file.fileno(), 1, self._bytes - 1) != b"\n":
            self._file.write(b"\n")
        self.began_s = time.monotonic()

    def append(self, piece: Piece) -> None:
        """Write one piece.

        Raises:
            OSError: The disk is full, or the file can't be written.
        """
        line = piece.model_dump_json().encode() + b"\n"
        self._bytes += len(line)
        assert self._bytes <= LIMIT_BYTES, "the limits of prompts keep answers small"
        require_current()
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
