"""`moe-train`: every command on one parser."""

import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated

import typer

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.screen import Screen

ROOM = "llama_stack_provider_moe.control.cli"
# Each module's commands, in the order of the help. A command line imports only the module of its command, since the
# models of all jobs take longer to import than most commands to run. A test compares this with what modules register.
MODULES = {
    "start_files": ("init", "templates"),
    "submit_commands": ("submit", "validate"),
    "job_commands": ("status", "logs", "cancel", "resume", "rm", "artifacts", "ls"),
    "label": ("label",),
    "sweep_commands": ("sweep", "sweeps"),
    "pipeline_commands": ("pipeline", "pipelines"),
    "chat": ("chat",),
    "top": ("top",),
    "data_commands": ("data",),
    "quota": ("quota",),
    "report": ("report",),
    "samples": ("samples",),
    "export": ("export",),
    "grade": ("grade",),
    "config": ("config",),
    "guard": ("guard",),
    "plan": ("plan",),
    "torch_commands": ("upcycle", "mix", "eval", "families", "analyze", "ablate", "probe", "experts"),
    "supervisor_command": ("supervisor",),
}

EPILOG = (
    "Exit codes: 0 success, or the job completed or is still running; 1 the job failed; 2 the request was refused, or "
    "the command line has a mistake; 3 the job was cancelled; 4 no server answered, or it stopped answering; 130 you "
    "pressed Ctrl-C (the job continues)."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version  # it takes longer than all of this module

        try:
            print(f"moe-train {version('llama-stack-provider-moe')}")
        except PackageNotFoundError:
            print("moe-train, version unknown: the package is not installed")
        raise typer.Exit(Exit.OK)


def moe_train(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train Mixture-of-Experts models on a Llama Stack server with provider inline::moe."""


def app_of(modules: Iterable[str] = MODULES) -> App:
    """`moe-train` with the commands of some modules; by default with all."""
    app = App(
        name="moe-train", epilog=EPILOG,
        help="Train Mixture-of-Experts models on a Llama Stack server with provider inline::moe.",
        no_args_is_help=True, pretty_exceptions_enable=False,
    )  # fmt: skip
    app.callback()(moe_train)
    for name in modules:
        import_module(f"{ROOM}.{name}").register(app)
    return app


def modules_of(words: Sequence[str]) -> Iterable[str]:
    """The module that a command line needs; all of them if it does not begin with a command."""
    return [name for name, commands in MODULES.items() if words and words[0] in commands] or MODULES


def main(arguments: list[str] | None = None) -> int:
    """Run `moe-train`; return the exit code. Without `--json`, typer reports a wrong command line and exits itself."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        return int(app_of(modules_of(words))(args=words, prog_name="moe-train", standalone_mode=not as_json) or Exit.OK)
    except typer.TyperException as error:
        Screen(as_json).error(error, error.format_message(), Exit.REFUSED)
        return Exit.REFUSED
