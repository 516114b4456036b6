"""One style for the word that stands for a value in help texts: FILE, INTEGER, cuda|cpu; nothing for a flag.

Left alone, typer shows `<str>` and `<bool>` beside the words that options name themselves.
"""

import inspect
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import typer.core

_WORDS: dict[object, str] = {int: "INTEGER", float: "NUMBER", Path: "FILE"}


def word_of(option: Any) -> str:
    """Return what stands for an option's value; empty for a flag.

    Args:
        option: typer's parameter.
    """
    if getattr(option, "is_flag", False):
        return ""
    annotation = option.type_descriptor.annotation
    inner = next((each for each in get_args(annotation) if each is not type(None)), annotation)
    if get_origin(inner) is Literal:
        found = "|".join(map(str, get_args(inner)))
    elif inspect.isclass(inner) and issubclass(inner, Enum):
        found = "|".join(str(each.value) for each in inner)
    else:
        found = _WORDS.get(inner, "TEXT")
    return option.metavar or found


def _styled(params: list[Any]) -> list[Any]:
    for param in params:
        if param.param_type_name == "argument":  # its name says what it is
            param.display_type_rich = _nothing
        else:
            param.metavar = word_of(param)
    return params


def _nothing(ctx: object) -> str:
    return ""


class _Command(typer.core.TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        """See typer."""
        return _styled(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    """A group of commands whose help has this style."""

    def get_params(self, ctx: Any) -> list[Any]:
        """See typer."""
        return _styled(super().get_params(ctx))


class App(typer.Typer):
    """Typer with this style for each of its commands.

    Args:
        cls: class of the group.
        settings: typer's.
    """

    def __init__(self, cls: type[Group] = Group, **settings: Any) -> None:
        super().__init__(cls=cls, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """See typer."""
        return super().command(name, cls=_Command, **settings)
