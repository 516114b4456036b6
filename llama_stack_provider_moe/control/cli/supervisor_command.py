"""`moe-train supervisor`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_stack_provider_moe.control.cli import local
from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add `supervisor` to `moe-train`."""
    app.command()(supervisor)


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
