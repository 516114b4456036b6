"""`moe-train config check`: check a server's run YAML, and this machine, before the server starts."""

import os
from pathlib import Path
from typing import Annotated, TypedDict

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen, text
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput

app = App(help="Check the configuration of a server.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Check the configuration of a server."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Run YAML of the server.")], as_json: Json = False
) -> None:
    """Check a run YAML as a server does when it starts: settings, folders, database, interpreters. Starts nothing."""

    def act(screen: Screen) -> Exit:
        document = checked(file)
        if screen.as_json:
            screen.document(document)
        else:
            screen.say(_shown(document))
        return Exit.OK

    end(as_json, act)


class Provider(TypedDict):
    """What one of our providers would use."""

    provider_id: str
    state_dir: str
    store: str
    warnings: list[str]


class Checked(TypedDict):
    """Our providers in a run YAML."""

    file: str
    providers: list[Provider]


def checked(file: Path) -> Checked:
    """Return what each of our providers in `file` would use.

    Raises:
        InvalidInput: the file is not a run YAML, or has no provider of ours.
        InvalidConfig: a provider has mistakes; all of them are named.
    """
    # yaml and SQLAlchemy take longer to import than other commands take to run.
    from llama_stack_provider_moe.control.config_check import run_yaml, surroundings
    from llama_stack_provider_moe.control.store import store_url

    providers: list[Provider] = []
    wrong = []
    for entry in run_yaml.entries(file, os.environ, "FILE"):
        problems = []
        if entry.module != run_yaml.MODULE:
            problems.append(f"module: {entry.module!r} is not valid; expected {run_yaml.MODULE!r} beside provider_type")
        try:
            config = run_yaml.configured(entry, os.environ)
        except InvalidConfig as error:
            wrong.append(InvalidConfig(entry.where, [*problems, *error.problems]))
            continue
        found = surroundings.check(config, os.environ, thoroughly=True)
        if problems or found.problems:
            wrong.append(InvalidConfig(entry.where, [*problems, *found.problems]))
        store = store_url.shown(config.store_url or f"sqlite:///{config.state_dir / 'jobs.db'}")
        providers.append({"provider_id": entry.provider_id, "state_dir": str(config.state_dir), "store": store,
                          "warnings": found.warnings})  # fmt: skip
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise InvalidConfig(str(file), [f"{error.where}: {each}" for error in wrong for each in error.problems])
    if not providers:
        expected = f"a run YAML with a provider_type {run_yaml.PROVIDER_TYPE} under providers.post_training"
        raise InvalidInput("FILE", str(file), expected)
    return {"file": str(file), "providers": providers}


def _shown(document: Checked) -> RenderableType:
    lines = []
    for each in document["providers"]:
        lines.append(f"{document['file']}: provider {each['provider_id']!r} can start")
        lines += [f"  state_dir: {each['state_dir']}", f"  store: {each['store']}"]
        lines += [f"  warning: {warning}" for warning in each["warnings"]]
    return Group(*map(text, lines))


def register(moe_train: typer.Typer) -> None:
    """Add `config` to `moe-train`."""
    moe_train.add_typer(app, name="config")
