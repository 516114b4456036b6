"""Messages as people write them -> canonical messages.

OpenAI's and Hugging Face's: `role`, `content` (text, a list of text parts, or null beside tool calls), `tool_calls`,
`tool_call_id`, `name`, `weight`, a reasoning model's `reasoning_content`, `thinking` or `reasoning`; and OpenAI's older
`function_call` with its result of role `function`. ShareGPT's: `from` and `value`. A list may mix them.
"""

from collections.abc import Mapping
from typing import Final

from llama_stack_provider_moe.errors import shorten
from llama_stack_provider_moe.spec.rows.conversation_rules import Part
from llama_stack_provider_moe.spec.rows.images import ContentPart, image_part
from llama_stack_provider_moe.spec.rows.messages import ROLES, Message, Role
from llama_stack_provider_moe.spec.rows.tool_calls import called, tool_calls
from llama_stack_provider_moe.spec.rows.typed_calls import with_typed_calls
from llama_stack_provider_moe.spec.rows.values import BadRow, Source, absent, blank, filled, from_json, text

IMAGES_NOTE: Final = "images"  # of a row, in its report
REASONING: Final = ("reasoning", "reasoning_content", "thinking")
# Keys that would change what a message means, and that nothing here reads.
MEANT: Final = frozenset({"image", "images", "audio", "audios", "video", "videos", "refusal", "label", "mask", "train"})
MEDIA: Final = ("image", "audio", "video", "file", "document", "input_image", "input_audio", "input_file")
_SPEAKERS: Final[Mapping[str, Role]] = {
    "system": "system", "developer": "developer", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
_ROLES: Final[Mapping[str, Role]] = {role: role for role in ROLES}


def messages(value: object, where: str, source: Source) -> Part:
    """The messages of a list, or of the JSON text of one; calls and results in their texts are read too.

    Raises:
        BadRow: it is not a list of messages, or empty.
    """
    if isinstance(value, str):
        value = from_json(value, where, "a list of messages")
    if not isinstance(value, list | tuple):
        raise BadRow(where, f"is {type(value).__name__}; expected text or a list of messages")
    if not value:
        raise BadRow(where, "is an empty list")
    said = [message(item, f"{where}[{index}]", source) for index, item in enumerate(value)]
    return with_typed_calls(Part(where, said), source)


def message(item: object, where: str, source: Source) -> Message:
    """One message.

    Raises:
        BadRow: it is not one.
    """
    if not isinstance(item, dict | Mapping):
        raise BadRow(where, f"is {type(item).__name__}; expected an object with role and content")
    given = {key: value for key, value in item.items() if not absent(value)}
    if "from" in given and "role" not in given:
        return _of_sharegpt(given, where, source)
    named = given.pop("role", None)
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None and named == "function":
        role = "tool"
    if role is None:
        raise BadRow(f"{where}.role", f"is {shorten(named)}; expected one of {', '.join(ROLES)}")
    if role == "developer":
        source.notes.add("a developer message")
    content = given.pop("content", None)
    if not given and isinstance(content, str):
        known = filled if role in ("user", "assistant") else text
        return {"role": role, "content": known(content, f"{where}.content")}
    return _whole(role, content, given, where, source)


def _whole(role: Role, content: object, given: dict[object, object], where: str, source: Source) -> Message:
    made: Message = {"role": role, "content": None}
    _add_reasoning(made, given, where, source)
    calls = given.pop("tool_calls", None)
    if calls is not None and not blank(calls):
        made["tool_calls"] = tool_calls(calls, f"{where}.tool_calls", source)
    if (call := given.pop("function_call", None)) is not None:
        if "tool_calls" in made:
            raise BadRow(f"{where}.function_call", "is beside tool_calls; keep one of them")
        made["tool_calls"] = [called(call, f"{where}.function_call", source)]
    if "tool_calls" in made:
        source.notes.add("tool calls")
        if role != "assistant":
            raise BadRow(f"{where}.tool_calls", f"is in a {role} message; only the assistant calls tools")
    made["content"] = _with_images(content, role, f"{where}.content", source) or _content(
        content, role, f"{where}.content", may_lack="tool_calls" in made
    )
    if (result_of := given.pop("tool_call_id", "")) != "":
        if role != "tool":
            raise BadRow(f"{where}.tool_call_id", f"is in a {role} message; only a tool's result has one")
        made["tool_call_id"] = filled(result_of, f"{where}.tool_call_id")
    if (name := given.pop("name", "")) != "":
        made["name"] = filled(name, f"{where}.name")
    _add_weight(made, given, where, source)
    _note_unread(given, where, source)
    return made


def _with_images(content: object, role: Role, where: str, source: Source) -> list[ContentPart] | None:
    """The parts of a message with images, its texts between them joined; None if it has no image."""
    parts = content if isinstance(content, list | tuple) else [content]
    if not any(image_part(part) is not None for part in parts):
        return None
    made: list[ContentPart] = []
    for index, part in enumerate(parts):
        found = image_part(part)
        if found is not None:
            _must_take(role, f"{where}[{index}]", source)
            made.append(found)
            continue
        told = _part(part, f"{where}[{index}]")
        if made and made[-1]["type"] == "text":
            made[-1]["text"] += told
        elif told:
            made.append({"type": "text", "text": told})
    source.notes.add(IMAGES_NOTE)
    return made


def _must_take(role: Role, where: str, source: Source) -> None:
    if role != "user":
        raise BadRow(where, f"is an image in a {role} message; only user messages have images")
    if source.no_images is not None:
        raise BadRow(where, f"is an image; {source.no_images}")


def _content(content: object, role: Role, where: str, may_lack: bool) -> str | None:
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    elif isinstance(content, Mapping):
        content = _part(content, where)
    if may_lack and (content is None or blank(content)):
        return None
    if may_lack or role in (
        "tool",
        "system",
        "developer",
    ):  # a tool's result may be empty, and so may the system's text
        return text(content, where)
    return filled(content, where)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return text(part, where)
    if not isinstance(part, Mapping):
        raise BadRow(where, f"is {type(part).__name__}; expected a text part")
    kind = part.get("type", "text")
    if kind == "text" and isinstance(part.get("text"), str):
        return text(part["text"], f"{where}.text")
    if isinstance(kind, str) and kind.startswith(MEDIA):
        raise BadRow(where, f"is a part of type {shorten(kind)}; jobs train on text and on images that came with rows")
    raise BadRow(where, f"is a part of type {shorten(kind)}; expected type text with its text")


def _add_reasoning(made: Message, given: dict[object, object], where: str, source: Source) -> None:
    found: dict[str, str] = {}
    for key in REASONING:
        if (value := given.pop(key, None)) is not None and (thought := text(value, f"{where}.{key}")).strip():
            found[key] = thought
    if not found:
        return
    if made["role"] != "assistant":
        raise BadRow(f"{where}.{next(iter(found))}", f"is in a {made['role']} message; only the assistant reasons")
    if len(set(found.values())) > 1:
        raise BadRow(where, f"has different texts as {' and '.join(found)}; keep one of them")
    source.notes.add("reasoning")
    made["reasoning"] = next(iter(found.values()))


def _add_weight(made: Message, given: dict[object, object], where: str, source: Source) -> None:
    weight = given.pop("weight", None)
    if weight is None:
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise BadRow(f"{where}.weight", f"is {shorten(weight)}; expected 0 or 1")
    if made["role"] != "assistant":
        if weight == 1:
            raise BadRow(f"{where}.weight", f"is 1 in a {made['role']} message; only the assistant's are learnt")
    elif weight == 0:
        source.notes.add("answers of weight 0")
        made["weight"] = 0


def _note_unread(given: dict[object, object], where: str, source: Source) -> None:
    for key, value in given.items():
        if not isinstance(key, str):
            raise BadRow(where, f"has a key of type {type(key).__name__}; expected text")
        if key in MEANT and not blank(value):
            raise BadRow(f"{where}.{key}", "would change what the message means, and this version does not read it; "
                         "remove the key or the row")  # fmt: skip
        source.unread.add(f"messages[].{key}")


def _of_sharegpt(given: dict[object, object], where: str, source: Source) -> Message:
    speaker, value = given.pop("from"), given.pop("value", None)
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"{where}.from", f"is {shorten(speaker)}; expected one of {', '.join(_SPEAKERS)}")
    if role == "developer":
        source.notes.add("a developer message")
    made: Message = {"role": role, "content": None}
    if speaker == "function_call":
        source.notes.add("tool calls")
        calls = (
            from_json(value, f"{where}.value", "a function's name and arguments") if isinstance(value, str) else value
        )
        made["tool_calls"] = tool_calls(calls, f"{where}.value", source)
    else:
        _add_reasoning(made, given, where, source)
        may_be_empty = role in ("system", "developer", "tool")
        made["content"] = text(value, f"{where}.value") if may_be_empty else filled(value, f"{where}.value")
    _add_weight(made, given, where, source)
    _note_unread(given, where, source)
    return made
