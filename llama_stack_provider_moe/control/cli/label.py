"""`moe-train label`: labels and note of a job, and the form of labels in other commands."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.sweep_documents import JobLabels
from llama_stack_provider_moe.control.cli.act import Where, answer, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, text
from llama_stack_provider_moe.control.cli.show import spelled
from llama_stack_provider_moe.errors import InvalidInput


def register(app: typer.Typer) -> None:
    """Add `label` to `moe-train`."""
    app.command()(label)


def label(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE|KEY-", help="Label to set, or with a dash at the end, to remove."),
    ] = None,
    note: Annotated[
        str | None, typer.Option(metavar="TEXT", help="New note about the job; an empty text removes it.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Set and remove labels of a job, or write a note about it; the job may have ended."""

    def act(server: Client, screen: Screen) -> Exit:
        wanted = changed(changes or [])
        if not wanted and note is None:
            raise InvalidInput("KEY=VALUE", None, "a label to set, KEY- to remove one, or --note TEXT")
        return answer(screen, server.label(job_id, wanted, note), shown)

    run(Where(url, key), as_json, act)


def changed(changes: Iterable[str]) -> dict[str, str | None]:
    """Return the new value of each label; None for one to remove.

    Raises:
        InvalidInput: a change has another form.
    """
    found: dict[str, str | None] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals and name.endswith("-"):
            name, new = name[:-1], None
        elif equals:
            new = value
        else:
            raise InvalidInput("KEY=VALUE", change, "KEY=VALUE, or KEY- to remove a label")
        if name in found:
            raise InvalidInput("KEY=VALUE", change, f"each label once; {name} is there twice")
        found[name] = new
    return found


def put_into(body: dict[str, object], labels: Iterable[str], note: str | None) -> None:
    """Add labels and a note from the command line to the body of a job.

    Raises:
        InvalidInput: a label has another form than KEY=VALUE.
    """
    wanted = changed(labels)
    for name, value in wanted.items():
        if value is None:
            raise InvalidInput("--label", f"{name}-", "KEY=VALUE")
    if wanted:
        own = body.get("labels")
        body["labels"] = {**(own if isinstance(own, dict) else {}), **wanted}
    if note is not None:
        body["note"] = note


def shown(document: JobLabels) -> RenderableType:
    """Render the labels and the note of a job."""
    lines = [f"job {document['job_uuid']}: {spelled(document['labels']) or 'no labels'}"]
    lines += [f"note: {document['note']}"] if document["note"] else []
    return Group(*map(text, lines))
