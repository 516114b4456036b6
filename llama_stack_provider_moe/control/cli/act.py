"""Shared by all commands: run an action, report errors, and exit with a code."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import typer
from rich.console import RenderableType

from llama_stack_provider_moe.control.cli.client import Client, state_of
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit, exit_of
from llama_stack_provider_moe.control.cli.follow import Follower
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.cli.views import view
from llama_stack_provider_moe.errors import MoeError, ServerLost, ServerRefused


class Where(NamedTuple):
    """URL of the server, and API key of the user."""

    url: str
    key: str | None


def run(where: Where, as_json: bool, act: Callable[[Client, Screen], int]) -> NoReturn:
    """Run `act` with a client of the server, and exit as `end` does."""

    def ask(screen: Screen) -> int:
        with Client(where.url, where.key, note=screen.note) as server:
            return act(server, screen)

    end(as_json, ask)


def end(as_json: bool, act: Callable[[Screen], int]) -> NoReturn:
    """Run `act`, report errors, and exit with the exit code."""
    screen = Screen(as_json)
    try:
        code = act(screen)
        sys.stdout.flush()
    except MoeError as error:
        code = exit_of(error)
        screen.error(error, str(error), code)
    except KeyboardInterrupt as interrupt:
        code = Exit.INTERRUPTED
        screen.error(interrupt, "interrupted", code)
    except BrokenPipeError:
        code = Exit.PIPE_CLOSED
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails too
    raise typer.Exit(code)


def answer[Document](screen: Screen, document: Document, shown: Callable[[Document], RenderableType]) -> Exit:
    """Print a document: as JSON with --json, else as `shown` renders it."""
    if screen.as_json:
        screen.document(document)
    else:
        screen.say(shown(document))
    return Exit.OK


def follow_job(server: Client, screen: Screen, job_id: str) -> Exit:
    """Show a job's progress until it has ended; return its outcome."""
    outcome = Exit.OK
    with hint(f"the job continues without this command. {ways_on(server, job_id)}"), view(screen) as shown:
        for status in Follower(server, job_id, screen.note).statuses():
            shown.show(status)
            outcome = OUTCOMES[state_of(status)]
    return outcome


@contextmanager
def hint(text: str) -> Iterator[None]:
    """If the server is lost or the user interrupts, add `text` to the error; it says what to do next."""
    try:
        yield
    except (KeyboardInterrupt, ServerLost, ServerRefused) as error:
        if isinstance(error, KeyboardInterrupt) or (exit_of(error) is Exit.LOST and getattr(error, "asked", True)):
            error.add_note(text)
        raise


def ways_on(server: Client, job_id: str, command: str = "status", option: str = "--watch") -> str:
    """Return the commands that a user may type next about a job.

    Args:
        server: client of the server that has the job.
        job_id: name of the job.
        command: command that follows the job.
        option: option that makes the command wait.
    """
    follow, stop = typed(server, command, job_id, option), typed(server, "cancel", job_id)
    return f"Follow it: {follow}   cancel it: {stop}"


def typed(server: Client, *words: str) -> str:
    """Return a command as a user must type it to reach the same server."""
    is_found = server.url == os.environ.get("MOE_TRAIN_URL", DEFAULT_URL)
    return " ".join(["moe-train", *words, *([] if is_found else ["--url", server.url])])
