"""A host's run YAML -> the configuration of its moe provider, read as the host reads it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput

PROVIDER_TYPE = "inline::moe"
_DISABLED = "__disabled__"
# ${env.NAME}, ${env.NAME:=used where it is unset or empty}, ${env.NAME:+used where it is set}
_REFERENCE = re.compile(r"\$\{env\.([A-Z0-9_]+)(?::([=+])([^}]*))?\}")


def read_run_config(path: Path, provider_id: str | None, environment: Mapping[str, str] = os.environ) -> ProviderConfig:
    """The configuration of the post-training provider `inline::moe` in a run YAML.

    Args:
        path: the YAML.
        provider_id: which one, where there are several.
        environment: for `${env.NAME}`.

    Raises:
        InvalidInput: no YAML of that kind, a variable without a value, or settings that are not valid.
    """
    found = {str(each.get("provider_id")): each.get("config") or {} for each in _providers(path, environment)}
    wanted = list(found) if provider_id is None else [provider_id]
    if len(wanted) != 1 or wanted[0] not in found:
        expected = f"the id of one {PROVIDER_TYPE} of {str(path)!r}, which has: {', '.join(map(repr, found)) or 'none'}"
        raise InvalidInput("--provider-id", provider_id, expected)
    try:
        return ProviderConfig.model_validate(substituted(found[wanted[0]], environment))
    except ValidationError as error:
        where = f"{path}: config of {wanted[0]}"
        problems = [
            f"{where}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)
        ]
        raise InvalidBody(problems) from None


def _providers(path: Path, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInput("--run-config", str(path), f"a run YAML that can be read ({error})") from None
    providers = content.get("providers") if isinstance(content, dict) else None
    listed = providers.get("post_training") if isinstance(providers, dict) else None
    if not isinstance(listed, list):
        raise InvalidInput("--run-config", str(path), "a run YAML with a list of providers.post_training")
    ours = [each for each in listed if isinstance(each, dict) and each.get("provider_type") == PROVIDER_TYPE]
    named = [{**each, "provider_id": substituted(each.get("provider_id"), environment)} for each in ours]
    return [each for each in named if each["provider_id"] != _DISABLED]


def substituted(value: Any, environment: Mapping[str, str]) -> Any:
    """`value` with its `${env.NAME}` filled in, at every depth; a filled-in text may become a number, true or null."""
    if isinstance(value, dict):
        return {key: substituted(each, environment) for key, each in value.items()}
    if isinstance(value, list):
        return [substituted(each, environment) for each in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        given = environment.get(name, "")
        if operator == "+":
            return os.path.expanduser(word if given else "")
        if not given and operator is None:
            raise InvalidInput("--run-config", match[0], f"environment variable {name} to be set, or a default: "
                               f"${{env.{name}:=...}}")  # fmt: skip
        return os.path.expanduser(given or word)

    filled = _REFERENCE.sub(fill, value)
    return value if filled == value else _typed(filled)


def _typed(filled: str) -> Any:
    words = {"": None, "true": True, "false": False}
    if filled.lower() in words:
        return words[filled.lower()]
    for number in (int, float):
        try:
            return number(filled)
        except ValueError:
            continue
    return filled
