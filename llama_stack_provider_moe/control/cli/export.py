"""`moe-train export`: prepare a trained model for serving, by the server or on this machine."""

from typing import Annotated, Any

import typer

from llama_stack_provider_moe.control.cli import llama_cpp_setup, torch_commands
from llama_stack_provider_moe.control.cli.act import Where, follow_job, run, ways_on
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App, Group
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen

DEFAULT = "job"


class JobOrCommand(Group):
    """A group whose first word may be a job instead of a command: `export JOB` means `export job JOB`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click. A word that is not a command is a job; for a job named like a command, use `export job`."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [DEFAULT, *args]
        return super().resolve_command(ctx, args)


app = App(
    cls=JobOrCommand, no_args_is_help=True,
    help="Prepare a trained model for serving. `export JOB` runs on the server, the other commands on this machine.",
)  # fmt: skip
llama_cpp_setup.register(app)
torch_commands.register_exports(app)


@app.command(name=DEFAULT)
def job(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Name of the training job, which must have completed.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Write base and adapter as one Hugging Face folder.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bf16|fp16|fp32", help="Data type of the merged matrices; default: the base's."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest size of one of its files, e.g. 5GB.")
    ] = None,
    gguf_types: Annotated[
        list[str] | None, typer.Option("--gguf", metavar="TYPE", help="Type of a GGUF file to write. Repeatable.")
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option(
            "--ollama",
            metavar="NAME",
            help="Name of a model to create on an Ollama server, from one of the GGUF files.",
        ),
    ] = None,
    ollama_url: Annotated[str | None, typer.Option(metavar="URL", help="URL of the Ollama server.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the result with the server's inference, and require an answer.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Repository of the Hugging Face hub to upload to."),
    ] = None,
    push_what: Annotated[
        str | None, typer.Option(metavar="adapter|merged|gguf", help="Artifact to upload; default: adapter.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="If the repository is created, make it public.")] = False,
    no_load_check: Annotated[
        bool,
        typer.Option("--no-load-check", help="Skip the comparison of logits, which needs the memory of the model."),
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "--wait", help="Wait until the export has ended; the exit code is its outcome.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Ask the server to export what a completed job has trained; `export JOB` does the same."""
    stated = {
        "merged": merged or None,
        "dtype": dtype,
        "shard_size": shard_size,
        "gguf": gguf_types,
        "serve": serve or None,
        "load_check": False if no_load_check else None,
    }
    body: dict[str, object] = {name: value for name, value in stated.items() if value is not None}
    body |= _ollama_block(ollama, ollama_url) | _push_block(push, push_what, public)

    def act(server: Client, screen: Screen) -> Exit:
        created = server.export(job_id, body)
        export_id = str(created.get("job_uuid"))
        if follow:
            if screen.as_json:
                screen.line(created)
            return follow_job(server, screen, export_id)
        if screen.as_json:
            screen.document(created)
        else:
            screen.say(f"job {export_id} is scheduled; it exports job {job_id}")
            screen.note(ways_on(server, export_id))
        return Exit.OK

    run(Where(url, key), as_json, act)


def _ollama_block(name: str | None, url: str | None) -> dict[str, object]:
    if name is None:
        if url is not None:
            raise typer.BadParameter("--ollama-url needs --ollama NAME")
        return {}
    return {"ollama": {"name": name} | ({} if url is None else {"url": url})}


def _push_block(repository: str | None, what: str | None, public: bool) -> dict[str, object]:
    if repository is None:
        if what is not None or public:
            raise typer.BadParameter("--push-what and --public need --push OWNER/NAME")
        return {}
    return {"push": {"repo_id": repository, "private": not public} | ({} if what is None else {"what": what})}


def register(moe_train: typer.Typer) -> None:
    """Add `export` to `moe-train`."""
    moe_train.add_typer(app, name="export")
