"""Where things go: what was asked for to standard output, notes and errors to standard error, JSON on request."""

import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from llama_stack_provider_moe.errors import ServerRefused
from llama_stack_provider_moe.jobs.output import printable

# A table is never folded where no person looks: `moe-train ls | grep` must find whole lines.
_NO_FOLDING = 10_000
# The server joins problems to one text. Each begins with its row or its field; a text may itself hold "; ".
_NEXT_PROBLEM = re.compile(r"; (?=row \d+: |[A-Za-z_][\w.\[\]-]*: |(?:the body|and \d+ more\b))")
_FIRST_ROW = re.compile(r"(problem\(s\) in \d+ row\(s\):) (?=row \d+: )")


class _Output(Console):
    """rich's console; what its reader closed it may not call the failure of a job (rich would exit with 1)."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class Screen:
    """Standard output and error of one command.

    Args:
        as_json: standard output gets JSON and nothing else, errors are JSON objects, notes are left out.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.live = not as_json and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        width = None if sys.stdout.isatty() else _NO_FOLDING
        self.out = _Output(width=width, markup=False, highlight=False, emoji=False, soft_wrap=width is not None)
        self._err = _Output(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def document(self, document: Any) -> None:
        """The one JSON document of a command."""
        print(json.dumps(document, indent=2), flush=True)

    def line(self, document: Any) -> None:
        """One JSON document of a stream, on a line of its own."""
        print(json.dumps(document), flush=True)

    def say(self, content: RenderableType) -> None:
        """Something for a person, on standard output."""
        if isinstance(content, str):
            self.out.print(text(content), soft_wrap=True)
        else:
            self.out.print(content)

    def print(self, lines: Iterable[str]) -> None:
        """Lines of a job's output, on standard output."""
        print(*map(printable, lines), sep="\n", flush=True)

    def note(self, content: str) -> None:
        """A line beside the matter, on standard error; not in JSON."""
        if not self.as_json:
            self._err.print(text(content))

    def error(self, error: BaseException | None, message: str, code: int) -> None:
        """Why the command ends with `code`, on standard error; the notes of `error` say what to do next."""
        hints = list(getattr(error, "__notes__", []))
        if not self.as_json:
            self._err.print(text("moe-train: " + "\n  ".join([*problems(message), *hints])))
            return
        told: dict[str, Any] = {"message": message, "exit_code": int(code)}
        if isinstance(error, ServerRefused):
            told["status"] = error.answered
        if hints:
            told["hints"] = hints
        print(json.dumps({"error": told}), file=sys.stderr, flush=True)


def text(content: str) -> Text:
    """`content` without what a terminal would obey: it may come from a server or a model."""
    return Text(printable(content))


def problems(message: str) -> list[str]:
    """A server's message, one problem a line; every character of it is kept but the joints."""
    return _NEXT_PROBLEM.split(_FIRST_ROW.sub(r"\1; ", message))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Columns of text under bold heads, without lines."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*map(text, row))
    return made
