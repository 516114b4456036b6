"""A host's run YAML -> our providers in it, read as the host reads it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from llama_stack_provider_moe.control.config_check.problems import checked
from llama_stack_provider_moe.errors import InvalidConfig, InvalidInput
from llama_stack_provider_moe.ground.json_kinds import content_of
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig

PROVIDER_TYPE = "inline::moe"
GUARD_TYPE = "inline::moe-guard"
APIS = {PROVIDER_TYPE: "post_training", GUARD_TYPE: "safety"}  # type of a provider -> its list in `providers`
MODULE = "llama_stack_provider_moe"
_DISABLED = "__disabled__"
# ${env.NAME}, ${env.NAME:=used if it is unset or empty}, ${env.NAME:+used if it is set}
_REFERENCE = re.compile(r"\$\{env\.([A-Z0-9_]+)(?::([=+])([^}]*))?\}")


class ProviderEntry(NamedTuple):
    """A provider of ours in a run YAML.

    Attributes:
        provider_id: id of the provider.
        where: file and provider, as errors name them.
        settings: its `config:`, as written.
        module: its `module:`, which tells the host where to find this package.
    """

    provider_id: str
    where: str
    settings: object
    module: object


def read_run_config(path: Path, provider_id: str | None, environment: Mapping[str, str] = os.environ) -> ProviderConfig:
    """Return the configuration of the post-training provider `inline::moe` in a run YAML.

    Args:
        path: the YAML.
        provider_id: id of the provider, if the YAML has several.
        environment: variables for `${env.NAME}`.

    Raises:
        InvalidInput: the file is not a run YAML, or does not have exactly one such provider.
        InvalidConfig: a variable has no value, or a setting is not valid.
    """
    found = {each.provider_id: each for each in entries(path, environment)}
    wanted = list(found) if provider_id is None else [provider_id]
    if len(wanted) != 1 or wanted[0] not in found:
        expected = f"the id of one {PROVIDER_TYPE} of {str(path)!r}, which has: {', '.join(map(repr, found)) or 'none'}"
        raise InvalidInput("--provider-id", provider_id, expected)
    return configured(found[wanted[0]], environment)


def configured(entry: ProviderEntry, environment: Mapping[str, str]) -> ProviderConfig:
    """Return the configuration of one provider `inline::moe`.

    Raises:
        InvalidConfig: a variable has no value, or a setting is not valid.
    """
    return checked(filled(entry, environment), entry.where, ProviderConfig)


def guard_configured(entry: ProviderEntry, environment: Mapping[str, str]) -> GuardConfig:
    """Return the configuration of one provider `inline::moe-guard`.

    Raises:
        InvalidConfig: a variable has no value, or a setting is not valid.
    """
    return checked(filled(entry, environment), entry.where, GuardConfig)


def filled(entry: ProviderEntry, environment: Mapping[str, str]) -> dict[str, object]:
    """Return the settings of one provider with their variables filled in.

    Raises:
        InvalidConfig: they are no block, or a variable has no value.
    """
    settings = {} if entry.settings is None else entry.settings
    if not isinstance(settings, dict):
        raise InvalidConfig(entry.where, ["config: is not valid; expected a block of settings"])
    found: dict[str, object] = {}
    unset = []
    for key, value in settings.items():
        try:
            found[key] = substituted(value, environment)
        except InvalidInput as error:
            unset.append(f"{key}: {error.value!r} has no value; expected {error.expected}")
    if unset:
        raise InvalidConfig(entry.where, unset)
    return found


def entries(
    path: Path, environment: Mapping[str, str], field: str = "--run-config", kind: str = PROVIDER_TYPE
) -> list[ProviderEntry]:
    """Return our providers of one type in a run YAML, except disabled ones.

    Args:
        path: the YAML.
        environment: variables for `${env.NAME}` in their ids.
        field: the caller's name for `path`, for errors.
        kind: type of the providers.

    Raises:
        InvalidInput: the file is not a run YAML, or has no providers of that API.
    """
    providers = _read(path, field).get("providers")
    listed = providers.get(APIS[kind]) if isinstance(providers, dict) else None
    if not isinstance(listed, list):
        raise InvalidInput(field, str(path), f"a run YAML with a list of providers.{APIS[kind]}")
    found = []
    for each in listed:
        if isinstance(each, dict) and each.get("provider_type") == kind:
            provider_id = str(substituted(each.get("provider_id"), environment))
            where = f"{path}: provider {provider_id!r} ({kind})"
            found.append(ProviderEntry(provider_id, where, each.get("config"), each.get("module")))
    return [each for each in found if each.provider_id != _DISABLED]


def kinds(path: Path, field: str) -> list[str]:
    """Return the types of ours whose API has a list of providers in a run YAML; post-training's where none has.

    Raises:
        InvalidInput: the file is not a run YAML.
    """
    providers = _read(path, field).get("providers")
    listed = providers if isinstance(providers, dict) else {}
    return [kind for kind, api in APIS.items() if isinstance(listed.get(api), list)] or [PROVIDER_TYPE]


def registered_shields(path: Path, field: str) -> list[object]:
    """Return `registered_resources.shields` of a run YAML, as written; empty if it has none.

    Raises:
        InvalidInput: the file is not a run YAML, or they are not a list.
    """
    resources = _read(path, field).get("registered_resources")
    listed = resources.get("shields") if isinstance(resources, dict) else None
    if listed is not None and not isinstance(listed, list):
        raise InvalidInput(field, str(path), "a run YAML with a list of registered_resources.shields")
    return listed or []


def _read(path: Path, field: str) -> dict[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        # The text of `error` quotes the line, which may hold a secret.
        mark = error.problem_mark
        at = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise InvalidInput(field, str(path), f"YAML{at} ({error.problem or error.context})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(field, str(path), f"a run YAML that can be read ({why})") from None
    if not isinstance(content, dict):
        raise InvalidInput(field, str(path), f"a run YAML with a list of providers.post_training or "
                           f"providers.safety; {content_of(content)}")  # fmt: skip
    return content


def substituted(value: object, environment: Mapping[str, str]) -> object:
    """Fill in `${env.NAME}` at every depth of `value`; the text that results may become a number, true or null."""
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


def _typed(filled: str) -> str | float | bool | None:
    words: dict[str, bool | None] = {"": None, "true": True, "false": False}
    if filled.lower() in words:
        return words[filled.lower()]
    for number in (int, float):
        try:
            return number(filled)
        except ValueError:
            continue
    return filled
