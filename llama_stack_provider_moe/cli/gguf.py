"""`moe-train export setup` and `moe-train export gguf`: llama.cpp obtained, and a GGUF file made with it."""

from dataclasses import asdict
from typing import Annotated

import typer

from llama_stack_provider_moe.cli import local
from llama_stack_provider_moe.cli.exits import Exit
from llama_stack_provider_moe.cli.screen import Screen
from llama_stack_provider_moe.llama_cpp import LICENCE, VERSION
from llama_stack_provider_moe.llama_cpp.install import SOURCES, install, missing_for_conversion

Libraries = Annotated[
    str | None,
    typer.Option("--libraries", metavar="|".join(SOURCES),
                 help="Prebuilt by npm, or built here (a C++ compiler and some 13 minutes); default: npm where it can "
                 "be had."),
]  # fmt: skip
Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL OUT --type TYPE ...", help="--help lists them.")
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, errors as JSON on standard error.")]


def register(app: typer.Typer) -> None:
    """Add both commands to the group `moe-train export`."""
    app.command(name="setup")(setup)
    app.command(
        name="gguf",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )(gguf)


def setup(libraries: Libraries = None, as_json: Json = False) -> None:
    """Install llama.cpp's converter and library for GGUF files, once; needs pip, and npm or a C++ compiler."""
    from llama_stack_provider_moe.cli.commands import end  # which adds this to its own

    end(as_json, lambda screen: _set_up(screen, libraries))


def gguf(arguments: Arguments = None, as_json: Json = False) -> None:
    """Write a Hugging Face folder as a GGUF file, verified by llama.cpp against transformers."""
    from llama_stack_provider_moe.cli.commands import end

    end(as_json, lambda screen: local.export_gguf(screen, arguments or []))


def _set_up(screen: Screen, libraries: str | None) -> Exit:
    tools, done = install(libraries, say=screen.note)
    missing = missing_for_conversion()
    if screen.as_json:
        told = {name: str(value) for name, value in asdict(tools).items()}
        screen.document({**told, "licence": LICENCE, "installed_now": done, "missing_packages": missing})
        return Exit.OK
    screen.say(
        f"llama.cpp {VERSION} ({LICENCE} licence) {'is installed' if done else 'was there already, whole'}\n"
        f"converter: {tools.converter}\nlibrary:   {tools.library} ({tools.libraries_from})"
    )
    if missing:
        screen.note(
            f"this Python lacks {', '.join(missing)}, which the converter imports: "
            "pip install 'llama-stack-provider-moe[train,export]'"
        )
    return Exit.OK
