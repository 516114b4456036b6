"""The YAML of rules of ToolGuard: which tools a model may call, with which arguments, for whom; and its checker."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from llama_stack_provider_moe.errors import InvalidBody, InvalidConfig, InvalidFile, InvalidInput, shorten
from llama_stack_provider_moe.ground.json_kinds import content_of
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.shields.argument_tests import ArgumentRule, is_pointer
from llama_stack_provider_moe.shields.closed_schema import ClosedSchema
from llama_stack_provider_moe.shields.lookalikes import skeleton
from llama_stack_provider_moe.shields.rule_places import check_rule
from llama_stack_provider_moe.shields.verdict import Level
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.validation_errors import validated

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
MAX_BYTES = 4 << 20
MAX_SHOWN = 1000  # problems of a file; a checker names them all
MESSAGE = "The assistant wanted to do something that is not allowed here."


class ToolRules(Block):
    """What a model may do with one tool. A tool that is not named may not be called at all."""

    parameters: dict[str, object] = Field(
        description="JSON Schema (2020-12) of the arguments. An object takes no other keys than those it names, unless "
        "it says `additionalProperties`. {}: the tool takes no arguments."
    )
    principals: list[str] = Field(
        default=["*"],
        min_length=1,
        max_length=1000,
        description="Callers who may use the tool, with * as a wildcard; `anonymous` without authentication, "
        "TENANT/NAME on a host with tenants.",
    )
    rules: list[ArgumentRule] = Field(default_factory=list, max_length=200, description="Rules on single arguments.")
    max_calls: int | None = Field(
        default=None, ge=1, le=128, description="Most calls of the tool in one message; left out: no limit of its own."
    )
    level: Level = Field(default="error", description="Level of a violation.")
    message: str | None = Field(default=None, max_length=500, description="Message for the user; left out: the file's.")


class Example(Block):
    """A call with the verdict that it must get; the checker tries each."""

    tool: str = Field(max_length=128, description="Name of the tool.")
    arguments: dict[str, object] | str = Field(description="Arguments, or the text that a model wrote for them.")
    principal: str = Field(default="anonymous", max_length=500, description="Who calls.")
    verdict: Literal["allowed", "refused"] = Field(description="What the rules must say.")


class ToolRulesFile(Block):
    """A file of rules; `read_rules` also checks names and schemas, whatever else is wrong with the file."""

    version: Literal[1] = Field(description="Version of this format.")
    tools: dict[str, ToolRules] = Field(max_length=1000, description="The tools that may be called, by name.")
    max_calls: int = Field(default=32, ge=1, le=128, description="Most tool calls in one message.")
    level: Level = Field(default="error", description="Level of a call of a tool that is not named.")
    message: str = Field(default=MESSAGE, max_length=500, description="Message for the user.")
    examples: list[Example] = Field(
        default_factory=list, max_length=1000, description="Calls with their verdict, which `guard check` tries."
    )

    @cached_property
    def schemas(self) -> dict[str, ClosedSchema]:
        """The closed schema of each tool."""
        return {name: ClosedSchema(tool.parameters, name) for name, tool in self.tools.items()}

    @cached_property
    def skeletons(self) -> dict[str, str]:
        """What each name looks like -> the name."""
        return {skeleton(name): name for name in self.tools}


class OpenPlace(NamedTuple):
    """A text argument that nothing limits."""

    tool: str
    argument: str


def read_rules(path: Path, field: str = "rules") -> ToolRulesFile:
    """Return the rules in a file.

    Args:
        path: a YAML or JSON file.
        field: the caller's name for it.

    Raises:
        InvalidInput: the file can't be read, or is not YAML.
        InvalidConfig: rules are not valid; every problem is named.
    """
    from llama_stack_provider_moe.ground import strict_yaml  # yaml takes longer to import than most servers need

    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InvalidInput(field, str(path), f"a file of at most {MAX_BYTES:,} bytes")
        content = strict_yaml.parse(data)
    except InvalidInput:
        raise
    except (OSError, InvalidFile, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or (str(error) or type(error).__name__)
        raise InvalidInput(field, str(path), f"a YAML file of rules ({why})") from None
    if not isinstance(content, dict):
        raise InvalidInput(field, str(path), f"an object with `version` and `tools`; {content_of(content)}")
    problems = _problems_of_tools(content)
    try:
        rules = validated(ToolRulesFile, content, shown=MAX_SHOWN)
    except InvalidBody as error:
        problems = [*error.problems, *problems]
    if problems:
        raise InvalidConfig(str(path), problems)
    return rules


def open_places(rules: ToolRulesFile) -> list[OpenPlace]:
    """Return the text arguments that neither the schema nor a rule limits; a checker warns of them."""
    found = []
    for name, tool in rules.tools.items():
        ruled = {rule.argument for rule in tool.rules}
        properties = tool.parameters.get("properties")
        for argument, schema in properties.items() if isinstance(properties, dict) else ():
            limits = {"enum", "const", "pattern", "format", "maxLength", "$ref", "allOf", "anyOf", "oneOf"}
            is_text = isinstance(schema, dict) and schema.get("type", "string") == "string"
            if (schema is True or (is_text and not limits & set(schema))) and f"/{argument}" not in ruled:
                found.append(OpenPlace(name, argument))
    return found


def _problems_of_tools(content: Mapping[str, object]) -> list[str]:
    """What is wrong with names and schemas, in content that may also be wrong otherwise: both are named at once."""
    tools = content.get("tools")
    found: list[str] = []
    looks: dict[str, str] = {}
    for name, tool in tools.items() if isinstance(tools, dict) else ():
        if not _NAME.fullmatch(name):
            what = "is not the name of a tool; expected 1 to 128 letters, digits and _ . : / -"
            found.append(f"tools: {shorten(name)} {what}")
        other = looks.setdefault(skeleton(name), name)
        if other != name:
            found.append(
                f"tools: {shorten(name)} looks like {shorten(other)}, so a person could take one for the other"
            )
        parameters = tool.get("parameters") if isinstance(tool, dict) else None
        if not isinstance(parameters, dict):
            continue
        field = f"tools.{shorten(name)[1:-1]}"
        found += _problems(ClosedSchema, parameters, f"{field}.parameters")
        rules = tool.get("rules")
        for number, rule in enumerate(rules if isinstance(rules, list) else ()):
            argument = rule.get("argument") if isinstance(rule, dict) else None
            if isinstance(argument, str) and is_pointer(argument):
                found += _problems(check_rule, parameters, rule, f"{field}.rules.{number}")
    return found


def _problems[**P](check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> list[str]:
    try:
        check(*args, **kwargs)
    except InvalidInput as error:
        return list(getattr(error, "problems", (str(error),)))
    return []
