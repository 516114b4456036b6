"""`moe-train data`: bring rows to the server, list, show and delete its data sets, and make one of flagged rows."""

from typing import Annotated

import typer

from llama_stack_provider_moe.client.dataset_documents import PushedDataset
from llama_stack_provider_moe.client.upload import SOURCE_FORMATS, SourceFormat, Upload, opened
from llama_stack_provider_moe.control.cli import data_check, show_data, upload_progress
from llama_stack_provider_moe.control.cli.act import Where, answer, hint, run, typed
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Images, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused

app = App(help="Check rows, upload them to the server, and list, show and delete your data sets.", no_args_is_help=True)

data_check.register(app)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the data set.")]


@app.callback()
def group() -> None:
    """Check rows, upload them to the server, and list, show and delete your data sets."""


@app.command()
def push(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="File of rows: JSON Lines or CSV, also gzipped, or Parquet; - for standard input."
        ),
    ],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the data set in jobs.")],
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="|".join(SOURCE_FORMATS),
            help="Format of the file; default: by the end of its name, and jsonl for standard input.",
        ),
    ] = None,
    images: Images = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload a file of rows as the current version of a data set; the server checks each row and names bad ones."""

    def act(server: Client, screen: Screen) -> Exit:
        with opened(file, _checked_format(file_format), images) as upload:
            again = "nothing was stored, unless the server had received every row; repeat the command"
            with hint(again), upload_progress.shown(screen, upload) as tick:
                body = upload.body(tick)
                pushed = server.push_dataset(name, body, upload.content_type, upload.content_encoding)
            _must_be_whole(server, pushed, upload)
        return answer(screen, pushed, show_data.pushed)

    run(Where(url, key), as_json, act)


@app.command(name="ls")
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of data sets to list at most.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="NAME", help="Data set after which the list starts.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the data sets that you uploaded, by name."""

    def act(server: Client, screen: Screen) -> Exit:
        return answer(screen, server.datasets(limit, after), show_data.datasets)

    run(Where(url, key), as_json, act)


@app.command()
def show(name: Name, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show the versions of a data set that you uploaded, and their columns."""

    def act(server: Client, screen: Screen) -> Exit:
        return answer(screen, server.dataset(name), show_data.dataset)

    run(Where(url, key), as_json, act)


@app.command()
def rm(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@VERSION]",
            help="Name of the data set; with the beginning of a version's SHA-256, only that version.",
        ),
    ],
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a data set that you uploaded, or one version of it. Jobs keep their copies of the rows."""

    def act(server: Client, screen: Screen) -> Exit:
        whole, at, version = name.partition("@")
        return answer(screen, server.delete_dataset(whole, version if at else None), show_data.deleted)

    run(Where(url, key), as_json, act)


@app.command()
def flagged(
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the data set to make; left out: only count.")
    ] = None,
    answered: Annotated[
        bool,
        typer.Option("--answered", help="Only those that end with an answer, for recipes that learn answers."),
    ] = False,
    shield: Annotated[
        str | None, typer.Option("--shield", metavar="SHIELD", help="Only what this shield flagged; default: any.")
    ] = None,
    everybody: Annotated[
        bool,
        typer.Option("--everybody", help="Those of every user, for administrators, with --name; default: your own."),
    ] = False,
    erase: Annotated[bool, typer.Option("--erase", help="Delete your own; data sets and jobs keep copies.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Count your conversations that shields flagged, make a data set of them, or delete them."""

    def act(server: Client, screen: Screen) -> Exit:
        others = {"--name": name is not None, "--answered": answered, "--shield": shield is not None,
                  "--everybody": everybody}  # fmt: skip
        if erase and any(others.values()):
            raise InvalidInput("--erase", next(other for other, is_given in others.items() if is_given), "--erase "
                               "alone, which deletes your own conversations")  # fmt: skip
        if name is None and any(others.values()):
            raise InvalidInput.missing("--name", "the name of the data set to make")
        if erase:
            return answer(screen, server.erase_feedback(), show_data.erased)
        if name is None:
            return answer(screen, server.feedback(), show_data.flagged)
        made = server.push_feedback(name, "answered" if answered else "all", shield, everybody)
        return answer(screen, made, show_data.pushed)

    run(Where(url, key), as_json, act)


def _checked_format(given: str | None) -> SourceFormat | None:
    if given is not None and given not in SOURCE_FORMATS:
        raise InvalidInput("--format", given, f"one of {', '.join(SOURCE_FORMATS)}")
    return given


def _must_be_whole(server: Client, pushed: PushedDataset, upload: Upload) -> None:
    """Raise if the server stored something else than what was sent."""
    if (pushed["received_bytes"], pushed["received_sha256"]) == (upload.sent_bytes, upload.sha256):
        return
    stored = f"{pushed['name']}@{pushed['sha256'][: show_data.VERSION_DIGITS]}"
    raise ServerRefused(
        f"the server received {pushed['received_bytes']} bytes with SHA-256 {pushed['received_sha256']}; sent were "
        f"{upload.sent_bytes} bytes with {upload.sha256}. Delete what it stored: {typed(server, 'data', 'rm', stored)}",
        200,
    )


def register(moe_train: typer.Typer) -> None:
    """Add `data` to `moe-train`."""
    moe_train.add_typer(app, name="data")
