"""Whether what a page has a person type exists: commands and options of `moe-train`, make targets, modules, files."""

import functools
import re
import shlex
from collections.abc import Set
from typing import Any

import typer
import typer.core
import typer.main

from llama_stack_provider_moe.control.cli.commands import app_of
from tests.contracts.doc_blocks import ROOT

SEPARATORS = set("|&;<>()\n")
OUR_FOLDERS = ("run_configs/", "job_templates/", "examples/", "benchmarks/", "tests/", "deploy/", "docs/")
# Wherever a token may stand for more than it says, as in a table of usage.
PLACEHOLDER = re.compile(r"\.\.\.|…|^\[|\]$")


class Unknown(AssertionError):
    """A page names what does not exist."""


@functools.cache
def whole_command() -> Any:
    """`moe-train` with all its commands. Made once: it takes a tenth of a second, and pages have hundreds of lines."""
    return typer.main.get_command(app_of())


@functools.cache
def make_targets() -> frozenset[str]:
    """The targets of the Makefile."""
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@functools.cache
def ignored_folders() -> tuple[str, ...]:
    """The folders that git ignores."""
    return tuple(line for line in (ROOT / ".gitignore").read_text("utf-8").split() if line.endswith("/"))


def segments(line: str) -> list[list[str]]:
    """The simple commands of a line of shell, each as its words."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    reader.commenters = "#"
    found: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= SEPARATORS:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def require_known(words: list[str]) -> None:
    """Refuse a simple command that names what we do not have.

    Raises:
        Unknown: it does.
    """
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words:
        return
    if words[0].rpartition("/")[2] == "moe-train":
        require_command(words[1:])
    elif words[0] == "make":
        _require({word for word in words[1:] if "=" not in word and not word.startswith("-")}, make_targets(), "make")
    elif re.fullmatch(r"(.*/)?python3?", words[0]) and words[1:2] == ["-m"]:
        name = words[2]
        if name.split(".")[0] in ("benchmarks", "examples", "tests"):
            path = ROOT / name.replace(".", "/")
            if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
                raise Unknown(f"python -m {name}: there is no such module")
    for word in words:
        require_file(word)


def require_file(word: str) -> None:
    """Refuse a path in one of our folders that is not there, unless git ignores it: then a person makes it."""
    if f"{word}/".startswith(ignored_folders()):
        return
    if word.startswith(OUR_FOLDERS) and not re.search(r"[*<>{}$]|::|[A-Z]{3}", word) and not (ROOT / word).exists():
        raise Unknown(f"{word}: there is no such file")


def _require(named: set[str], known: Set[str], what: str) -> None:
    if named - known:
        raise Unknown(f"{what} has no {', '.join(sorted(named - known))}")


def require_command(words: list[str]) -> None:
    """Refuse words after `moe-train` that name no command, or an option that it lacks.

    Raises:
        Unknown: they do.
    """
    command = whole_command()
    taken = ["moe-train"]
    rest = [word.strip("[]").rstrip(".,;:") for word in words]
    while isinstance(command, typer.core.TyperGroup):
        if not rest or rest[0].startswith("-") or rest[0] == "COMMAND":
            break
        if rest[0] in command.commands:
            taken.append(rest.pop(0))
            command = command.commands[taken[-1]]
        elif "job" in command.commands and type(command).resolve_command is not typer.core.TyperGroup.resolve_command:
            command = command.commands["job"]
        else:
            raise Unknown(f"{' '.join(taken)} has no command {rest[0]!r}")
    if (command.context_settings or {}).get("ignore_unknown_options"):
        return
    known = {option for param in command.params for option in [*param.opts, *param.secondary_opts]} | {"--help"}
    named = {word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)}
    _require(named, known, " ".join(taken))


def require_parses(words: list[str]) -> None:
    """Refuse a whole command line that the parser would refuse for its shape: an argument missing, or one too many."""
    command = whole_command()
    rest = list(words)
    if any(PLACEHOLDER.search(word) for word in rest) or not rest:
        return
    context: Any = None
    while isinstance(command, typer.core.TyperGroup):
        if not rest or rest[0].startswith("-"):
            return
        _, command, rest = command.resolve_command(context, rest)
    try:
        command.make_context("moe-train", list(rest))
    except typer.TyperException as error:
        message = error.format_message()
        if not re.search(r"does not exist|No such file|is a directory", message):
            raise Unknown(f"moe-train {' '.join(words)}: {message}") from error
    except typer.Exit:  # --help
        return
