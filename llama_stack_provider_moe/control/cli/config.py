"""`moe-train config check`: check a server's run YAML, and this machine, before the server starts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen, text
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput

if TYPE_CHECKING:
    from llama_stack_provider_moe.control.config_check.run_yaml import ProviderEntry

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


class GuardProvider(TypedDict):
    """What one of our providers of shields would do."""

    provider_id: str
    on_failure: str
    rules: list[str]
    probes: list[str]
    warnings: list[str]


class Checked(TypedDict):
    """Our providers in a run YAML."""

    file: str
    providers: list[Provider]
    guards: list[GuardProvider]


def checked(file: Path) -> Checked:
    """Return what each of our providers in `file` would use.

    Raises:
        InvalidInput: the file is not a run YAML, or has no provider of ours.
        InvalidConfig: a provider has mistakes; all of them are named.
    """
    # yaml and SQLAlchemy take longer to import than other commands take to run.
    from llama_stack_provider_moe.control.config_check import run_yaml

    providers: list[Provider] = []
    guards: list[GuardProvider] = []
    wrong = []
    kept: dict[str, Path | None] = {}  # provider of jobs -> folder of flagged conversations
    keeps: list[tuple[GuardProvider, Path]] = []
    for kind in run_yaml.kinds(file, "FILE"):
        for entry in run_yaml.entries(file, os.environ, "FILE", kind):
            problems = []
            if entry.module != run_yaml.MODULE:
                expected = f"{run_yaml.MODULE!r} beside provider_type"
                problems.append(f"module: {entry.module!r} is not valid; expected {expected}")
            try:
                if kind == run_yaml.GUARD_TYPE:
                    guard, folder = _guard(entry, run_yaml.registered_shields(file, "FILE"), problems)
                    guards.append(guard)
                    keeps += [] if folder is None else [(guard, folder)]
                else:
                    provider, kept[entry.provider_id] = _provider(entry, problems)
                    providers.append(provider)
            except InvalidConfig as error:
                wrong.append(InvalidConfig(entry.where, [*problems, *error.problems]))
                continue
            if problems:
                wrong.append(InvalidConfig(entry.where, problems))
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise InvalidConfig(str(file), [f"{error.where}: {each}" for error in wrong for each in error.problems])
    if not providers and not guards:
        expected = " or ".join(f"{kind} under providers.{api}" for kind, api in run_yaml.APIS.items())
        raise InvalidInput("FILE", str(file), f"a run YAML with a provider_type {expected}")
    for guard, folder in keeps:
        guard["warnings"] += [
            f"feedback.folder: {str(folder)!r} is not that of provider {name!r} ({other or 'none'}), whose jobs can't "
            "train on what is flagged"
            for name, other in kept.items() if other != folder
        ]  # fmt: skip
    return {"file": str(file), "providers": providers, "guards": guards}


def _provider(entry: "ProviderEntry", problems: list[str]) -> tuple[Provider, Path | None]:
    """What a provider of post-training would use, and its folder of flagged conversations.

    Adds what this machine lacks to `problems`.
    """
    from llama_stack_provider_moe.control.config_check import run_yaml, surroundings
    from llama_stack_provider_moe.control.store import store_url

    config = run_yaml.configured(entry, os.environ)
    found = surroundings.check(config, os.environ, thoroughly=True)
    problems += found.problems
    store = store_url.shown(config.store_url or f"sqlite:///{config.state_dir / 'jobs.db'}")
    used: Provider = {"provider_id": entry.provider_id, "state_dir": str(config.state_dir), "store": store,
                      "warnings": found.warnings}  # fmt: skip
    return used, None if config.feedback is None else config.feedback.folder


def _guard(entry: "ProviderEntry", registered: list[object], problems: list[str]) -> tuple[GuardProvider, Path | None]:
    """What a provider of shields would do, and its folder of flagged conversations.

    Adds what this machine lacks, and what is wrong with the shields that the file registers, to `problems`.
    """
    from llama_stack_provider_moe.control.config_check import guard_surroundings, registered_shields, run_yaml

    config = run_yaml.guard_configured(entry, os.environ)
    found = guard_surroundings.check(config, os.environ)
    problems += found.problems
    shields = registered_shields.check(registered, entry.provider_id, config, os.environ)
    problems += shields.problems
    does: GuardProvider = {"provider_id": entry.provider_id, "on_failure": config.on_failure,
                           "rules": list(config.rules), "probes": list(config.probes),
                           "warnings": [*found.warnings, *shields.warnings]}  # fmt: skip
    return does, None if config.feedback is None else config.feedback.folder


def _shown(document: Checked) -> RenderableType:
    lines = []
    for each in document["providers"]:
        lines.append(f"{document['file']}: provider {each['provider_id']!r} can start")
        lines += [f"  state_dir: {each['state_dir']}", f"  store: {each['store']}"]
        lines += [f"  warning: {warning}" for warning in each["warnings"]]
    for guard in document["guards"]:
        lines.append(f"{document['file']}: provider {guard['provider_id']!r} can start")
        lines += [f"  without a score: {guard['on_failure']}", f"  rules: {', '.join(guard['rules']) or 'none'}",
                  f"  probes: {', '.join(guard['probes']) or 'none'}"]  # fmt: skip
        lines += [f"  warning: {warning}" for warning in guard["warnings"]]
    return Group(*map(text, lines))


def register(moe_train: typer.Typer) -> None:
    """Add `config` to `moe-train`."""
    moe_train.add_typer(app, name="config")
