"""`moe-train`: every command on one parser."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from llama_stack_provider_moe.control.cli import (
    chat,
    config,
    data_commands,
    export,
    guard,
    job_commands,
    job_report,
    label,
    local,
    plan,
    quota,
    report,
    start_files,
    sweep_commands,
    top,
    torch_commands,
)
from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen

EPILOG = (
    "Exit codes: 0 success, or the job completed or is still running; 1 the job failed; 2 the request was refused, or "
    "the command line has a mistake; 3 the job was cancelled; 4 no server answered, or it stopped answering; 130 you "
    "pressed Ctrl-C (the job continues)."
)

app = App(
    name="moe-train", epilog=EPILOG,
    help="Train Mixture-of-Experts models on a Llama Stack server with provider inline::moe.",
    no_args_is_help=True, pretty_exceptions_enable=False,
)  # fmt: skip

start_files.register(app)
job_commands.register(app)
app.command(name="label")(label.label)
sweep_commands.register(app)
app.command(name="chat")(chat.chat)
app.command(name="top")(top.top)
app.add_typer(data_commands.app, name="data")
app.command(name="quota")(quota.quota)
report.app.command(name="job")(job_report.job)
app.add_typer(report.app, name="report")
app.add_typer(export.app, name="export")
app.add_typer(config.app, name="config")
app.add_typer(guard.app, name="guard")
app.command(name="plan")(plan.plan)
torch_commands.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"moe-train {version('llama-stack-provider-moe')}")
        except PackageNotFoundError:
            print("moe-train, version unknown: the package is not installed")
        raise typer.Exit(Exit.OK)


@app.callback()
def moe_train(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train Mixture-of-Experts models on a Llama Stack server with provider inline::moe."""


@app.command()
def supervisor(
    run_config: Annotated[Path, typer.Option("--run-config", metavar="FILE", help="Run YAML of the server.")],
    provider_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Id of the inline::moe provider, if the YAML has several.")
    ] = None,
    exit_when_idle: Annotated[
        bool,
        typer.Option("--exit-when-idle", help="Exit when no job has run for the YAML's idle_exit_s; default: stay."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the jobs of a server on this machine, which must share its database and state folder."""
    end(as_json, lambda screen: local.supervise(screen, run_config, provider_id, exit_when_idle))


def main(arguments: list[str] | None = None) -> int:
    """Run `moe-train`; return the exit code. Without `--json`, typer reports a wrong command line and exits itself."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        return int(app(args=words, prog_name="moe-train", standalone_mode=not as_json) or Exit.OK)
    except typer.TyperException as error:
        Screen(as_json).error(error, error.format_message(), Exit.REFUSED)
        return Exit.REFUSED
