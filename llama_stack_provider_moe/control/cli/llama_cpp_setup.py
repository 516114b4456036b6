"""`moe-train export setup`: install llama.cpp, which GGUF files need."""

from dataclasses import asdict
from typing import Annotated

import typer

from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.llama_cpp import LICENCE, VERSION
from llama_stack_provider_moe.llama_cpp.install import SOURCES, install, missing_for_conversion

Libraries = Annotated[
    str | None,
    typer.Option("--libraries", metavar="|".join(SOURCES),
                 help="Source of the library: prebuilt, from npm, or built here (with a C++ compiler, 13 minutes); "
                 "default: npm if it is available."),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add `setup` to `moe-train export`."""
    app.command(name="setup")(setup)


def setup(libraries: Libraries = None, as_json: Json = False) -> None:
    """Install llama.cpp, which GGUF files need. Needs pip, and npm or a C++ compiler."""
    end(as_json, lambda screen: _set_up(screen, libraries))


def _set_up(screen: Screen, libraries: str | None) -> Exit:
    tools, done = install(libraries, say=screen.note)
    missing = missing_for_conversion()
    if screen.as_json:
        told = {name: str(value) for name, value in asdict(tools).items()}
        screen.document({**told, "licence": LICENCE, "installed_now": done, "missing_packages": missing})
        return Exit.OK
    screen.say(
        f"llama.cpp {VERSION} ({LICENCE} licence) {'is installed' if done else 'is already installed'}\n"
        f"converter: {tools.converter}\nlibrary:   {tools.library} ({tools.libraries_from})"
    )
    if missing:
        screen.note(
            f"this Python lacks {', '.join(missing)}, which the converter imports: "
            "pip install 'llama-stack-provider-moe[train,export]'"
        )
    return Exit.OK
