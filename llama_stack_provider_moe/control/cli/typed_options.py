"""A command line of `spec.command_words` -> a typer command with the same arguments and options."""

import inspect
from collections.abc import Callable
from typing import Annotated

import typer
from pydantic.fields import FieldInfo

from llama_stack_provider_moe.control.cli.act import end
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.spec.command_words import (
    CommandLine,
    checked,
    is_list,
    metavar,
    plain_type,
    written,
)


def command[Kind: CommandLine](
    kind: type[Kind], help_text: str, act: Callable[[Screen, Kind], int]
) -> Callable[..., None]:
    """Return a function that typer can register.

    Args:
        kind: the arguments and options, with their defaults and meanings.
        help_text: what the command does, in one sentence.
        act: called with the checked command line; returns the exit code.
    """

    def run(context: typer.Context, as_json: bool, **given: str | bool | list[str] | None) -> None:
        stated = {name: value for name, value in given.items() if _is_typed(context, name)}
        end(as_json, lambda screen: act(screen, checked(kind, stated)))

    parameters = [_parameter(name, field) for name, field in kind.model_fields.items() if name != "as_json"]
    parameters.insert(0, _keyword("context", typer.Context, inspect.Parameter.empty))
    parameters.append(_keyword("as_json", Json, False))
    run.__doc__ = help_text
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    if field.is_required():
        argument = typer.Argument(metavar=metavar(field), help=field.description)
        return _keyword(name, Annotated[str, argument], inspect.Parameter.empty)
    default = field.get_default(call_default_factory=True)
    if plain_type(field) is bool:
        return _keyword(name, Annotated[bool, typer.Option(written(name, field), help=field.description)], default)
    option = typer.Option(written(name, field), metavar=metavar(field), help=field.description)
    if is_list(field):
        return _keyword(name, Annotated[list[str] | None, option], None)
    # The model reads the text, so that every error names option, value and what is expected.
    return _keyword(name, Annotated[str | None, option], None if default is None else str(default))


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
