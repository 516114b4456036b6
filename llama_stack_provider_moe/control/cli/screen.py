"""Where output goes: results to standard output, notes and errors to standard error, JSON on request."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llama_stack_provider_moe.errors import ServerRefused
from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.jobdir.output import printable

# Tables are not wrapped in pipes and files: `moe-train ls | grep` must find whole lines.
_NO_FOLDING = 10_000
# The server joins problems into one text. Each starts with its row or field; its text may contain "; ".
_NEXT_PROBLEM = re.compile(r"; (?=row \d+: |[A-Za-z_][\w.\[\]-]*: |(?:the body|and \d+ more\b))")
_FIRST_ROW = re.compile(r"(problem\(s\) in \d+ row\(s\):) (?=row \d+: )")


class _Output(Console):
    """rich's console, but a closed pipe raises: rich would exit with 1, which means that a job failed."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class Screen:
    """Standard output and error of one command.

    Args:
        as_json: print only JSON on standard output, errors as JSON objects, and no notes.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.live = not as_json and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._is_drawn = False
        width = None if sys.stdout.isatty() else _NO_FOLDING
        self.out = _Output(width=width, markup=False, highlight=False, emoji=False, soft_wrap=width is not None)
        self._err = _Output(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def document(self, document: object) -> None:
        """Print the one JSON document of a command."""
        print(json.dumps(document, indent=2), flush=True)

    def line(self, document: object) -> None:
        """Print one JSON document of a stream on a line of its own."""
        print(json.dumps(document), flush=True)

    def say(self, content: RenderableType) -> None:
        """Print text for a user on standard output."""
        if isinstance(content, str):
            self.out.print(text(content), soft_wrap=True)
        elif self.out.width < _NO_FOLDING:
            self.out.print(content)
        else:  # rich pads every line of a table to the longest one, which may have hundreds of characters
            with self.out.capture() as printed:
                self.out.print(content)
            self.out.out(
                "\n".join(line.rstrip() for line in printed.get().removesuffix("\n").split("\n")), highlight=False
            )

    def print(self, lines: Iterable[str]) -> None:
        """Print lines of a job's output on standard output."""
        print(*map(printable, lines), sep="\n", flush=True)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While a live line is drawn on standard output: notes to the same terminal are printed above it."""
        self._is_drawn = True
        try:
            yield
        finally:
            self._is_drawn = False

    def note(self, content: str) -> None:
        """Print a remark on standard error; with JSON, print nothing."""
        if not self.as_json:
            # Written past rich, a note would end up inside the live line.
            shares_terminal = self._is_drawn and sys.__stderr__ is not None and sys.__stderr__.isatty()
            (self.out if shares_terminal else self._err).print(text(content))

    def error(self, error: BaseException | None, message: str, code: int) -> None:
        """Print on standard error why the command ends with `code`, and what to do next (the notes of `error`)."""
        # A user may have typed a password in the server's URL, and this text may end up in a CI log.
        message = without_passwords(message)
        hints = [without_passwords(hint) for hint in getattr(error, "__notes__", [])]
        if not self.as_json:
            self._err.print(text("moe-train: " + "\n  ".join([*problems(message), *hints])))
            return
        told: dict[str, object] = {"message": message, "exit_code": int(code)}
        if isinstance(error, ServerRefused):
            told["status"] = error.answered
        if hints:
            told["hints"] = hints
        print(json.dumps({"error": told}), file=sys.stderr, flush=True)


def text(content: str) -> Text:
    """Remove terminal sequences from `content`, which may come from a server or a model."""
    return Text(printable(content))


def problems(message: str) -> list[str]:
    """Split a server's message into one problem per line; only the separators are dropped."""
    return _NEXT_PROBLEM.split(_FIRST_ROW.sub(r"\1; ", message))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table with bold heads and no lines."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*map(text, row))
    return made
