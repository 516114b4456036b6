"""`moe-train export`: what was trained, ready to serve; of a job by its server, or here, with torch and no server."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llama_stack_provider_moe.cli import gguf, local
from llama_stack_provider_moe.cli.exits import Exit
from llama_stack_provider_moe.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.cli.screen import Screen
from llama_stack_provider_moe.cli.server import Server

DEFAULT = "job"


class JobOrCommand(TyperGroup):
    """A group whose first word may be a job instead of a command: `export JOB` is `export job JOB`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click; a word that is no command is a job's name. Of a job called as a command is, say `export job`."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [DEFAULT, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=JobOrCommand, no_args_is_help=True,
    help="What was trained, ready to serve: `export JOB` by the server that trained it; other commands work here, with "
    "torch and no server.",
)  # fmt: skip
gguf.register(app)


@app.command(name=DEFAULT)
def job(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The training job, completed.")],
    merged: Annotated[bool, typer.Option("--merged", help="Base plus adapter as one Hugging Face folder.")] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|fp32", help="Of the merged matrices; default: as in the base.")
    ] = None,
    shard_size: Annotated[str | None, typer.Option(metavar="5GB", help="Most bytes of one of its files.")] = None,
    gguf_types: Annotated[
        list[str] | None, typer.Option("--gguf", metavar="TYPE", help="A GGUF file of this type. Repeatable.")
    ] = None,
    ollama: Annotated[
        str | None, typer.Option("--ollama", metavar="NAME", help="Make a model of an Ollama server of one of them.")
    ] = None,
    ollama_url: Annotated[str | None, typer.Option(metavar="URL", help="Of that server.")] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload to this repository of the hub.")
    ] = None,
    push_what: Annotated[
        str | None, typer.Option(metavar="adapter|merged|gguf", help="What is uploaded; default: the adapter.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made may be read by all.")] = False,
    no_load_check: Annotated[
        bool, typer.Option("--no-load-check", help="Compare no logits: it takes the memory of the model.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "--wait", help="Stay until it has ended, and end as it ends.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Have the server export what a completed job has trained; `export JOB` alone does the same."""
    from llama_stack_provider_moe.cli import commands  # which adds this group to its own

    stated: dict[str, Any] = {
        "merged": merged or None,
        "dtype": dtype,
        "shard_size": shard_size,
        "gguf": gguf_types,
        "load_check": False if no_load_check else None,
    }
    if ollama is None and ollama_url is not None:
        raise typer.BadParameter("--ollama-url needs --ollama NAME beside it")
    if push is None and (push_what is not None or public):
        raise typer.BadParameter("--push-what and --public need --push OWNER/NAME beside them")
    body = {name: value for name, value in stated.items() if value is not None}
    if ollama is not None:
        body["ollama"] = {"name": ollama} | ({} if ollama_url is None else {"url": ollama_url})
    if push is not None:
        body["push"] = {"repo_id": push, "private": not public} | ({} if push_what is None else {"what": push_what})

    def act(server: Server, screen: Screen) -> Exit:
        created = server.export(job_id, body)
        export_id = str(created.get("job_uuid"))
        if follow:
            if screen.as_json:
                screen.line(created)
            return commands.follow_job(server, screen, export_id)
        if screen.as_json:
            screen.document(created)
        else:
            screen.say(f"job {export_id} is scheduled; it exports job {job_id}")
            screen.note(commands.ways_on(server, export_id))
        return Exit.OK

    commands.run(commands.Where(url, key), as_json, act)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def check(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOBFOLDER|ADAPTER [--base ...] [--merged FOLDER]", help="--help lists them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Load what a job saved in a fresh process, and compare its logits with those recorded at the end of training."""
    from llama_stack_provider_moe.cli import commands

    commands.end(as_json, lambda screen: local.export_check(screen, arguments or []))


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def merge(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="BASE ADAPTER OUT ...", help="--help lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base, tensor by tensor, into a Hugging Face folder."""
    from llama_stack_provider_moe.cli import commands

    commands.end(as_json, lambda screen: local.export_merge(screen, arguments or []))
