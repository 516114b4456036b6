"""Tool calls, the tools of a row and the variables of its chat template, as people write them -> canonical ones."""

from collections.abc import Mapping
from typing import Final, NotRequired, TypedDict, cast

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.messages import FunctionCall, ToolCall
from llama_stack_provider_moe.spec.rows.values import BadRow, Source, absent, filled, from_json, plain

# Arguments of transformers' `apply_chat_template`, which a row can't set.
RESERVED: Final = frozenset({
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip


class Settings(TypedDict):
    """What a canonical row has beside its messages."""

    tools: NotRequired[list[dict[str, object]]]
    chat_template_kwargs: NotRequired[dict[str, object]]


def tool_calls(value: object, where: str, source: Source) -> list[ToolCall]:
    """The calls of one message: a list of them, one alone, or the JSON text of either.

    Raises:
        BadRow: it is something else, or two calls have the same id.
    """
    if isinstance(value, str):
        value = from_json(value, where, "a list of tool calls")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow(where, f"is {type(value).__name__}; expected a list of tool calls")
    if not value:
        raise BadRow(where, "is an empty list")
    calls = [called(item, f"{where}[{index}]", source) for index, item in enumerate(value)]
    ids = [call["id"] for call in calls if "id" in call]
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise BadRow(where, f"has two calls with id {shorten(twice)}")
    return calls


def called(item: object, where: str, source: Source) -> ToolCall:
    """One call: OpenAI's `{id, type, function}`, or the function's name and arguments alone.

    Raises:
        BadRow: it is something else.
    """
    if not isinstance(item, Mapping):
        raise BadRow(where, f"is {type(item).__name__}; expected an object with a function's name and arguments")
    given = {key: value for key, value in item.items() if not absent(value)}
    kind = given.pop("type", "function")
    if kind != "function":
        raise BadRow(f"{where}.type", f"is {shorten(kind)}; expected 'function'")
    number = given.pop("id", None)
    function = given.pop("function", None)
    inner = where
    if function is None:
        function, given = given, {}
    else:
        inner = f"{where}.function"
    if not isinstance(function, Mapping):
        raise BadRow(inner, f"is {type(function).__name__}; expected an object with name and arguments")
    for key in given:
        source.unread.add(f"tool_calls[].{key}")
    for key in function:
        if key not in ("name", "arguments"):
            source.unread.add(f"tool_calls[].function.{key}")
    name = filled(function.get("name"), f"{inner}.name")
    call: FunctionCall = {"name": name, "arguments": _arguments(function.get("arguments"), f"{inner}.arguments")}
    if number is None or number == "":
        return {"type": "function", "function": call}
    return {"type": "function", "id": filled(number, f"{where}.id"), "function": call}


def _arguments(value: object, where: str) -> dict[str, object]:
    if isinstance(value, str):
        value = from_json(value, where, "an object") if value.strip() else {}
    if absent(value):
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(where, f"is {shorten(value)}; expected an object, or the JSON text of one")
    return cast(dict[str, object], plain(value, where))


def tools(value: object, where: str) -> list[dict[str, object]]:
    """Functions in the envelope of chat templates, from a list with or without it, or the JSON text of one.

    Raises:
        BadRow: it is something else, or two functions have the same name.
    """
    if isinstance(value, str):
        value = from_json(value, where, "a list of tools") if value.strip() else []
    if not isinstance(value, list | tuple):
        raise BadRow(where, f"is {type(value).__name__}; expected a list of tools")
    found: dict[str, dict[str, object]] = {}
    for index, item in enumerate(value):
        at = f"{where}[{index}]"
        if isinstance(item, str):
            item = from_json(item, at, "a tool")
        if not isinstance(item, Mapping):
            raise BadRow(at, f"is {type(item).__name__}; expected a function's name, description and parameters")
        tool = cast(dict[str, object], plain(item, at))
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        kind, function = tool.setdefault("type", "function"), tool["function"]
        if kind != "function":
            raise BadRow(f"{at}.type", f"is {shorten(kind)}; expected 'function'")
        if not isinstance(function, dict):
            raise BadRow(f"{at}.function", f"is {type(function).__name__}; expected an object with name and parameters")
        name = filled(function.get("name"), f"{at}.function.name")
        if name in found:
            raise BadRow(f"{at}.function.name", f"is {shorten(name)}, as that of another tool")
        found[name] = tool
    return list(found.values())


def settings(source: Source, inside: str = "") -> Settings:
    """A row's tools, and the variables of its chat template; both may be empty.

    Args:
        source: the row, or the object inside a column that has them.
        inside: path of that object with a dot behind it, for the problem's field.

    Raises:
        BadRow: they are not valid.
    """
    given = source.take("tools")
    functions = [] if given is None else tools(given, f"{inside}tools")
    kwargs = _kwargs(source.take("chat_template_kwargs"), f"{inside}chat_template_kwargs")
    parallel, where = source.take("parallel_tool_calls"), f"{inside}parallel_tool_calls"
    if parallel is not None:
        if not isinstance(parallel, bool):
            raise BadRow(where, f"is {shorten(parallel)}; expected true or false")
        if kwargs.setdefault("parallel_tool_calls", parallel) is not parallel:
            raise BadRow(where, "differs from the value in chat_template_kwargs; keep one of them")
    if functions:
        source.notes.add("tools")
    found: Settings = {}
    if functions:
        found["tools"] = functions
    if kwargs:
        found["chat_template_kwargs"] = kwargs
    return found


def _kwargs(value: object, where: str) -> dict[str, object]:
    if isinstance(value, str):
        value = from_json(value, where, "an object") if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRow(where, f"is {type(value).__name__}; expected an object of the chat template's variables")
    found = cast(dict[str, object], plain(value, where))
    if taken := sorted(RESERVED & found.keys()):
        raise BadRow(f"{where}.{taken[0]}", "is not a variable of a chat template that a row can set")
    return found
