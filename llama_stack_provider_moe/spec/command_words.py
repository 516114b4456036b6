"""A command line as a pydantic model: `moe-train` shows its fields as options, and its training process reads them.

A field is an option (`top_k` is `--top-k`), unless `positional` makes it an argument. `words` turns a model into a
command line, and `read` turns it back, so both sides share names, defaults, ranges and meanings.
"""

import argparse
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, MoeError
from llama_stack_provider_moe.spec.error_words import expected


class CommandLine(BaseModel):
    """What a user typed after the name of a command."""

    model_config = ConfigDict(extra="forbid")


class JsonCommandLine(CommandLine):
    """The command line of a command that can print its report as JSON."""

    as_json: bool = Field(
        default=False, description="Print the report as JSON.", json_schema_extra={"option": "--json"}
    )


def positional(description: str, metavar: str) -> Any:
    """A required argument without an option name."""
    return Field(description=description, json_schema_extra={"metavar": metavar})


def option(default: object, description: str, metavar: str | None = None, **limits: Any) -> Any:
    """An option; `limits` are pydantic's (`ge`, `le`, ...)."""
    if isinstance(default, list):
        limits["default_factory"] = default.copy
    else:
        limits["default"] = default
    return Field(description=description, json_schema_extra={"metavar": metavar} if metavar else None, **limits)


def written(name: str, field: FieldInfo) -> str:
    """The spelling of the field on a command line: `--top-k` for an option, `SOURCE` for an argument."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return str(extra["metavar"]) if field.is_required() else str(extra.get("option", f"--{name.replace('_', '-')}"))


def metavar(field: FieldInfo) -> str | None:
    """The word that stands for the value in a help text."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    named: dict[object, str] = {int: "INTEGER", float: "NUMBER"}
    found = extra.get("metavar") or "|".join(choices(field)) or named.get(plain_type(field))
    return str(found) if found else None


def plain_type(field: FieldInfo) -> object:
    """The type of the field without its None."""
    annotation: object = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next(each for each in get_args(annotation) if each is not type(None))
    return annotation


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of a field that allows only a few."""
    kind = plain_type(field)
    return get_args(kind) if get_origin(kind) is Literal else ()


def is_list(field: FieldInfo) -> bool:
    """Whether a user may type the option more than once."""
    return get_origin(plain_type(field)) is list


def checked[Kind: CommandLine](kind: type[Kind], given: Mapping[str, object]) -> Kind:
    """The command line with these values.

    Raises:
        InvalidInput: one value is not valid.
        InvalidBody: several values are not valid.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = [_problem(kind, each) for each in error.errors()]
    if len(problems) == 1:
        raise problems[0]
    raise InvalidBody([str(each) for each in problems])


def words(line: CommandLine) -> list[str]:
    """The command line that `read` reads; it leaves out what the user left out."""
    made: list[str] = []
    for name, field in type(line).model_fields.items():
        if name not in line.model_fields_set:
            continue
        value = getattr(line, name)
        if field.is_required():
            made.append(str(value))
        elif isinstance(value, bool):
            made += [written(name, field)] if value else []
        else:
            for each in value if isinstance(value, list) else [value]:
                # argparse would read a value that begins with a dash as an option.
                joined = str(each).startswith("-")
                made += [f"{written(name, field)}={each}"] if joined else [written(name, field), str(each)]
    return made


def read[Kind: CommandLine](kind: type[Kind], argv: Sequence[str] | None, name: str) -> Kind:
    """The command line in `argv`; left out: the arguments of this process.

    Raises:
        InvalidInput: a value is not valid.
    """
    parser = argparse.ArgumentParser(prog=name, add_help=False, allow_abbrev=False)
    for field_name, field in kind.model_fields.items():
        if field.is_required():
            parser.add_argument(field_name)
        elif plain_type(field) is bool:
            parser.add_argument(written(field_name, field), dest=field_name, action="store_true", default=None)
        else:
            parser.add_argument(
                written(field_name, field), dest=field_name, action="append" if is_list(field) else "store"
            )
    given = vars(parser.parse_args(argv))
    return checked(kind, {key: value for key, value in given.items() if value is not None})


def answered[Kind: CommandLine](
    kind: type[Kind],
    argv: Sequence[str] | None,
    name: str,
    act: Callable[[Kind], int],
    mistakes: tuple[type[MoeError], ...] = (InvalidInput,),
) -> int:
    """Run `act` with the command line in `argv`; an error is one line on standard error.

    Args:
        kind: the command line.
        argv: its words; None: the arguments of this process.
        name: the command as the user typed it, without `moe-train`.
        act: the function to run; returns the exit code.
        mistakes: errors that end with exit code 2; others end with 1.
    """
    try:
        return act(read(kind, argv, f"moe-train {name}"))
    except MoeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, mistakes) else 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"{name}: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _problem(kind: type[CommandLine], error: ErrorDetails) -> InvalidInput:
    name, value = str(error["loc"][0]), error["input"]
    field = kind.model_fields[name]
    allowed = choices(field)
    wanted = str(error["ctx"]["error"]) if error["type"] == "value_error" else expected(error)
    return InvalidInput(written(name, field), value, f"one of {', '.join(allowed)}" if allowed else wanted)
