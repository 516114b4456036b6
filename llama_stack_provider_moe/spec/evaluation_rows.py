"""Rows of the kinds that only an evaluation has -> canonical rows, or their problems; `spec.rows` does the others.

scenario  {"messages": [...], "tools": [...], "forbidden": [...]}
    tools      functions as chat templates take them: {"type": "function", "function": {"name", "description",
               "parameters": a JSON schema}}, or the inner object alone
    forbidden  {"name": tool} or {"name": tool, "arguments": {argument: regular expression}}: every call of this tool is
               forbidden, or each whose arguments all match (Python's `re.search`, on text or on the value's JSON)
judged    {"prompt": str, "answer": str, "refusal": true | false}, prompt optional: an answer that a person has labelled
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from pydantic import Field, ValidationError, field_validator, model_validator

from llama_stack_provider_moe.errors import RowProblem
from llama_stack_provider_moe.spec import Block
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.rows import Message, conversation

MOST_TOOLS = 64
PATTERN_LIMIT = 512  # characters
OwnKind = Literal["scenario", "judged"]


class ForbiddenCall(TypedDict):
    """One of a canonical scenario's forbidden calls."""

    name: str
    arguments: dict[str, str]


class ScenarioRow(TypedDict):
    """A canonical row of kind `scenario`; each tool is a function in the form that chat templates take."""

    messages: list[Message]
    tools: list[dict[str, object]]
    forbidden: list[ForbiddenCall]


class JudgedRow(TypedDict):
    """A canonical row of kind `judged`."""

    prompt: str
    answer: str
    refusal: bool


class Function(Block):
    """A tool as it is described to the model."""

    name: str = Field(min_length=1, max_length=128)
    description: str = Field(default="", max_length=8192)
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(Block):
    """A function in the envelope of chat templates."""

    type: Literal["function"] = "function"
    function: Function


class Forbidden(Block):
    """Calls of a tool that a scenario forbids."""

    name: str = Field(min_length=1, max_length=128)
    arguments: dict[str, str] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _patterns(cls, arguments: dict[str, str]) -> dict[str, str]:
        for name, pattern in arguments.items():
            try:
                re.compile(pattern[: PATTERN_LIMIT + 1])
            except re.error as error:
                raise ValueError(f"{name}: {pattern[:40]!r} is not a regular expression ({error})") from None
            if len(pattern) > PATTERN_LIMIT:
                raise ValueError(f"{name}: a pattern has at most {PATTERN_LIMIT} characters")
        return arguments


class Scenario(Block):
    """One scripted scenario."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    forbidden: list[Forbidden] = Field(min_length=1, max_length=MOST_TOOLS)

    @field_validator("tools", mode="before")
    @classmethod
    def _in_an_envelope(cls, tools: object) -> object:
        if not isinstance(tools, list):
            return tools
        return [
            {"type": "function", "function": tool} if isinstance(tool, Mapping) and "function" not in tool else tool
            for tool in tools
        ]

    @field_validator("messages")
    @classmethod
    def _the_model_is_next(cls, messages: list[Message]) -> list[Message]:
        if messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"ends with a {messages[-1]['role']} turn; expected a user or tool turn")
        return messages

    @model_validator(mode="after")
    def _forbidden_tools_exist(self) -> "Scenario":
        known = {tool.function.name for tool in self.tools}
        strange = sorted({each.name for each in self.forbidden} - known) if self.tools else []
        if strange:
            raise ValueError(
                f"forbidden: {strange[0]!r} is not valid; expected one of the tools {', '.join(sorted(known))}"
            )
        return self


class Judged(Block):
    """An answer, and whether a person considers it a refusal."""

    prompt: str = ""
    answer: str
    refusal: bool = Field(strict=True)


_MODELS: dict[OwnKind, type[Block]] = {"scenario": Scenario, "judged": Judged}


def canonical_own(row: object, number: int, kind: OwnKind) -> dict[str, Any] | RowProblem:
    """The canonical form of one row, or its first problem.

    Args:
        row: as the host gave it; lists and objects may be JSON text, as data frames keep them.
        number: the row's number from 1, for the problem's text.
        kind: of the row.
    """
    if not isinstance(row, Mapping):
        return RowProblem(number, "row", f"is {type(row).__name__}, not an object")
    given = {key: _parsed(value) if kind == "scenario" else value for key, value in row.items()}
    given = {key: value for key, value in given.items() if not _absent(value)}
    if kind == "scenario":
        talk = conversation({"messages": given.get("messages")}, number, "messages", answered=False)
        if isinstance(talk, RowProblem):
            return talk
        given["messages"] = talk["messages"]
    try:
        return _MODELS[kind].model_validate(given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "row"
        return RowProblem(number, where, reason(first))


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _parsed(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(value)
    except ValueError:
        return value
    return parsed
