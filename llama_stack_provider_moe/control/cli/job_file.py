"""A job file in JSON or YAML -> the body of a job. Reads strictly: each key once, and only values that JSON has."""

import json
import sys
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NoReturn

from llama_stack_provider_moe.control.cli import packaged
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.json_kinds import content_of

STANDARD_INPUT = "-"
type PackagedFile = Callable[[str, str, str], Traversable]


class _KeyTwice(ValueError):
    """A key is given twice in one JSON object. The JSON parser does not know the line."""


def read_job_file(file: str, packaged_file: PackagedFile = packaged.job_template) -> tuple[dict[str, object], Path]:
    """Return the job (or pipeline) in `file`, and the folder that its relative paths start from.

    Args:
        file: a path, `-` for standard input, or `@NAME` for a template of this package.
        packaged_file: returns a template by its name, see `packaged`.

    Raises:
        InvalidInput: the file can't be read, or is not a JSON or YAML object.
    """
    template = None
    if file.startswith("@"):
        template = packaged_file(file[1:], "FILE", "@")
        data, beside = template.read_bytes(), Path()
    else:
        try:
            data = sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidInput("FILE", file, f"a job file that can be read ({error})") from None
        beside = Path() if file == STANDARD_INPUT else Path(file).parent
    language = _language(template.name if template is not None else file, data)
    try:
        body = _parsed(data, language)
    except RecursionError:
        raise InvalidInput("FILE", file, f"a job file in {language} (it is nested too deeply)") from None
    except ValueError as error:  # invalid JSON or YAML, or not text
        raise InvalidInput("FILE", file, f"a job file in {language} ({error})") from None
    if not isinstance(body, dict):
        raise InvalidInput("FILE", file, f"a job file, which holds an object; {content_of(body)}")
    return body, beside


def read_value(file: str, what: str, name: str = "FILE") -> object:
    """Return the JSON or YAML value in a file.

    Args:
        file: a path, or `-` for standard input.
        what: what the file should hold, for errors.
        name: of the argument or option, for errors.

    Raises:
        InvalidInput: the file can't be read, or is neither JSON nor YAML.
    """
    try:
        data = sys.stdin.buffer.read() if file == STANDARD_INPUT else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidInput(name, file, f"a file that can be read ({why})") from None
    language = _language(file, data)
    try:
        value = _parsed(data, language)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise InvalidInput(name, file, f"{what}, in {language} ({why})") from None
    if value is None:
        raise InvalidInput(name, file, f"{what}; {content_of(value)}")
    return value


def parse_json(data: str | bytes) -> object:
    """Return a JSON value.

    Raises:
        ValueError: it is not JSON, a key is given twice, or a value is NaN or infinite.
    """
    try:
        value: object = json.loads(data, object_pairs_hook=_object, parse_constant=_not_json)
        return value
    except _KeyTwice as error:
        raise (_repeated_key(data) if isinstance(data, bytes) else None) or error from None


def _repeated_key(data: bytes) -> ValueError | None:
    """Find the same mistake and its line with the YAML parser; JSON without tabs is YAML."""
    from llama_stack_provider_moe.ground import strict_yaml

    try:
        strict_yaml.parse(data)
    except strict_yaml.KeyTwice as error:
        return error
    except ValueError:
        pass
    return None


def _language(file: str, data: bytes) -> str:
    """Return the language: by the file's suffix, else by its first character."""
    suffix = Path(file).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return "YAML"
    return "JSON" if suffix == ".json" or data.lstrip()[:1] in (b"{", b"[") else "YAML"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:  # json would keep the last one and say nothing
            raise _KeyTwice(f"key {key!r} is given twice in one object")
        found[key] = value
    return found


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _parsed(data: bytes, language: str) -> object:
    if not data.strip():
        return None  # the JSON parser would ask for a value at line 1
    if language == "JSON":
        return parse_json(data)
    from llama_stack_provider_moe.ground import strict_yaml  # yaml takes longer to import than other commands to run

    return strict_yaml.parse(data)
