"""`moe-train chat`: talk to what a job trained, or to a model, in a terminal or through a pipe."""

import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Literal

import typer

from llama_stack_provider_moe.client.calls import JobFilters
from llama_stack_provider_moe.client.documents import progress_of
from llama_stack_provider_moe.client.playground_documents import Playground
from llama_stack_provider_moe.control.cli.act import Where, hint, run, typed
from llama_stack_provider_moe.control.cli.chat_served import ServedChat, served_model
from llama_stack_provider_moe.control.cli.chat_turns import Asked, Chat
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import OUTCOMES, Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused
from llama_stack_provider_moe.jobdir.state import UNFINISHED, JobState

POLL_S = 0.5
# The artifacts that the bare name of a job means.
_BEST = ("model", "merged", "adapter")


def register(app: typer.Typer) -> None:
    """Add `chat` to `moe-train`."""
    app.command()(chat)


def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="JOB|MODEL", help="Job whose result answers (JOB, JOB/epoch-2), a playground, or a model."
        ),
    ],
    adapter: Annotated[
        Literal["on", "off", "both"], typer.Option(help="Adapter on, off (the base model), or both in turn.")
    ] = "on",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the choice of tokens.")] = 42,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Randomness: 0.01 to 2; 0: always the most likely token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of probability that tokens are chosen from.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Largest number of tokens of an answer.")] = 256,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the conversation.")] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Show the experts that made each answer.")] = False,
    idle: Annotated[
        int, typer.Option(min=5, max=7200, metavar="SECONDS", help="Time that a new playground stays without a prompt.")
    ] = 600,
    replace: Annotated[
        bool, typer.Option("--replace", help="Cancel your other playground, of which there can be only one.")
    ] = False,
    served: Annotated[
        bool,
        typer.Option("--served", help="Ask the server's own inference, which serves the job's result: no playground."),
    ] = False,
    end: Annotated[bool, typer.Option("--end", help="End the playground with the chat; default: leave it.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Chat with what a job trained, or with a model. From a pipe, all of the input is one message."""

    asked = Asked(adapter, seed, temperature, top_p, max_tokens, routing)

    def act(server: Client, screen: Screen) -> Exit:
        if served:
            if end or replace:
                raise InvalidInput("--end" if end else "--replace", True, "to be left out with --served, which needs "
                                   "no playground")  # fmt: skip
            model = served_model(server, target)
            screen.note(f"{target} is served as {model}")
            return _talked(ServedChat(server, screen, model, asked, system), screen)
        job_id = _found(server, target) or _started(server, screen, target, idle, replace)

        def talk() -> Exit:
            return _talked(Chat(server, screen, _opened(server, screen, job_id), asked, system), screen)

        return _and_ended(server, job_id, talk) if end else _and_left(server, screen, job_id, talk)

    run(Where(url, key), as_json, act)


def _and_ended(server: Client, job_id: str, talk: Callable[[], Exit]) -> Exit:
    """Talk, and cancel the playground whatever happens."""
    with hint(f"the playground may still run. End it: {typed(server, 'cancel', job_id)}"):
        try:
            return talk()
        finally:
            server.cancel(job_id)


def _and_left(server: Client, screen: Screen, job_id: str, talk: Callable[[], Exit]) -> Exit:
    """Talk, and say at the very end, also after an error, that the playground stays."""
    again, cancel = typed(server, "chat", job_id), typed(server, "cancel", job_id)
    stays = f"the playground stays for a while. Chat again: {again}   end it: {cancel}"
    try:
        with hint(stays):
            outcome = talk()
    except (InvalidInput, ServerRefused) as refused:
        # 409: it has ended.
        if isinstance(refused, InvalidInput) or refused.answered == HTTPStatus.BAD_REQUEST:
            refused.add_note(stays)
        raise
    screen.note(stays)
    return outcome


def _found(server: Client, target: str) -> str | None:
    """The caller's open playground of a model, or the playground of that name; None without one."""
    names = {target, *(f"{target}/{artifact}" for artifact in _BEST)}
    owner = server.quota()["owner"]  # an administrator's list has the playgrounds of others
    filters: JobFilters = {"recipe": "playground", "state": [state.value for state in sorted(UNFINISHED)]}
    for line in server.jobs(100, **filters)["data"]:
        is_wanted = line["job_uuid"] == target or (line.get("owner", owner) == owner and line["model"] in names)
        if is_wanted and server.playground(line["job_uuid"])["is_open"]:
            return line["job_uuid"]
    return None


def _started(server: Client, screen: Screen, target: str, idle_s: int, replace: bool) -> str:
    body = {"recipe": "playground", "model": target, "playground": {"idle_s": idle_s, "replace": replace}}
    with hint(f"to see whether the playground was created: {typed(server, 'ls')}"):
        try:
            created = server.submit(body)
        except ServerRefused as refused:
            if refused.answered == HTTPStatus.CONFLICT and not replace:
                again = typed(server, "chat", target, "--replace")
                refused.add_note(f"if it is another playground of yours: end that one and chat with {again}")
            raise
    for line in created.get("notes", []):
        screen.note(line)
    return created["job_uuid"]


def _opened(server: Client, screen: Screen, job_id: str) -> Playground:
    """Wait until a playground has loaded its model.

    Raises:
        ServerRefused: it has ended before.
    """
    said = None
    while True:
        found = server.playground(job_id)
        if found["loaded"] is not None and found["is_open"]:
            return found
        status = server.status(job_id)
        progress = progress_of(status)
        stage = progress.get("stage")
        if JobState(status["status"]).over:
            raise ServerRefused(f"playground {job_id} has ended: {progress.get('reason') or status['status']}", 409)
        if stage != said:
            screen.note(f"playground {job_id}: {stage}")
        said = stage
        time.sleep(POLL_S)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("standard input", data[error.start : error.end],
                           f"UTF-8 text; byte {error.start + 1:,} is the first that is not") from None  # fmt: skip


def _talked(talk: Chat | ServedChat, screen: Screen) -> Exit:
    if not sys.stdin.isatty():
        message = _text(sys.stdin.buffer.read()).strip()
        if not message:
            raise InvalidInput("standard input", "", "a message")
        return Exit.OK if talk.say(message) else OUTCOMES[JobState.FAILED]
    screen.note("Type a message. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C between answers, ends the chat.")
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return Exit.OK
        if not message.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in message):
            screen.note("the message is not UTF-8 text; type it again")
        elif message:
            talk.say(message)
