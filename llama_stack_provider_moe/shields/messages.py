"""Messages of a conversation as anybody may send them -> typed and bounded messages, which shields read.

The wire's form is OpenAI's chat completion: `content` is text, a list of parts, or null; an assistant may have
`tool_calls`. Every bound has an error that names the field, because a caller may be an attacker who sends whatever he
likes. What only a model can have written wrong (a tool call without a name, arguments that are no JSON) is no error
here: ToolGuard answers it with a violation.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast, get_args

from llama_stack_provider_moe.errors import InvalidInput

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)
MAX_MESSAGES = 2_000
MAX_CHARACTERS = 4_000_000  # of all texts and arguments of a conversation
MAX_PARTS = 256  # of one message
MAX_TOOL_CALLS = 128  # of one message
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_KIND_SHOWN = 32


class ToolCall(NamedTuple):
    """A tool call as the model wrote it.

    Attributes:
        name: the function's name; None where there is none, or something other than text.
        arguments: the text that should be a JSON object; None where there is none.
        kind: `function`, or another kind of call, which has no JSON arguments.
    """

    name: str | None
    arguments: str | None
    kind: str


class Message(NamedTuple):
    """One message.

    Attributes:
        role: who speaks.
        text: its text parts, joined by line feeds.
        other_parts: types of its parts that are no text, such as `image_url`.
        tool_calls: of an assistant.
    """

    role: Role
    text: str
    other_parts: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def scored_text(self) -> str:
        """What a probe reads: the text, and after it each tool call as `name(arguments)`."""
        calls = [f"{call.name or ''}({call.arguments or ''})" for call in self.tool_calls]
        return "\n".join(filter(None, (self.text, *calls)))


type Conversation = tuple[Message, ...]


def of_text(text: str, field: str = "input") -> Conversation:
    """Return a conversation of one message of the user.

    Raises:
        InvalidInput: the text is too long, or no text.
    """
    return (Message("user", _text(text, field)),)


def canonical(messages: Sequence[object], field: str = "messages") -> Conversation:
    """Return the messages.

    Args:
        messages: as JSON has them.
        field: the caller's name for `messages`.

    Raises:
        InvalidInput: there is none, there are too many, or one has not the form of a message.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidInput(field, f"{len(messages)} messages", f"1 to {MAX_MESSAGES:,} messages")
    found: list[Message] = []
    characters = 0
    for number, each in enumerate(messages):
        message = _message(each, f"{field}[{number}]")
        characters += len(message.text) + sum(len(call.arguments or "") for call in message.tool_calls)
        if characters > MAX_CHARACTERS:
            raise InvalidInput(field, "longer", f"at most {MAX_CHARACTERS:,} characters in all messages")
        found.append(message)
    return tuple(found)


def last_assistant(conversation: Conversation) -> Message | None:
    """Return the last message of the assistant, whose tool calls are the ones that a caller is about to run."""
    return next((each for each in reversed(conversation) if each.role == "assistant"), None)


def _message(given: object, field: str) -> Message:
    if not isinstance(given, Mapping):
        raise InvalidInput(field, given, "an object with role and content")
    role = given.get("role")
    if role not in ROLES:
        raise InvalidInput(f"{field}.role", role, f"one of {', '.join(ROLES)}")
    text, others = _content(given.get("content"), f"{field}.content")
    calls = _tool_calls(given.get("tool_calls"), f"{field}.tool_calls")
    legacy = given.get("function_call")  # before `tool_calls`; some engines still run it
    if legacy is not None:
        calls = (*calls, _call({"type": "function", "function": legacy}, f"{field}.function_call"))
    if calls and role != "assistant":
        raise InvalidInput(f"{field}.tool_calls", f"of role {role}", "tool calls of the assistant alone")
    if given.get("content") is None and not calls and role != "assistant":
        raise InvalidInput(f"{field}.content", None, "text or a list of parts")
    return Message(cast("Role", role), text, others, calls)


def _content(given: object, field: str) -> tuple[str, tuple[str, ...]]:
    if given is None:
        return "", ()
    if isinstance(given, str):
        return _text(given, field), ()
    if not isinstance(given, list):
        raise InvalidInput(field, given, "text or a list of parts")
    if len(given) > MAX_PARTS:
        raise InvalidInput(field, f"{len(given)} parts", f"at most {MAX_PARTS} parts")
    texts, others = [], []
    for number, part in enumerate(given):
        where = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise InvalidInput(where, part, "a part, an object with a type")
        if kind in _TEXT_PARTS:
            texts.append(_text(part.get(_TEXT_PARTS[kind]), f"{where}.{_TEXT_PARTS[kind]}"))
        else:
            others.append(_text(kind, f"{where}.type")[:_KIND_SHOWN])
    return "\n".join(texts), tuple(others)


def _tool_calls(given: object, field: str) -> tuple[ToolCall, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise InvalidInput(field, given, "a list of tool calls")
    if len(given) > MAX_TOOL_CALLS:
        raise InvalidInput(field, f"{len(given)} tool calls", f"at most {MAX_TOOL_CALLS}")
    return tuple(_call(each, f"{field}[{number}]") for number, each in enumerate(given))


def _call(given: object, field: str) -> ToolCall:
    if not isinstance(given, Mapping):
        raise InvalidInput(field, given, "an object with type and function")
    kind = given.get("type", "function")
    function = given.get("function")
    about: Mapping[str, object] = function if isinstance(function, Mapping) else {}
    name, arguments = about.get("name"), about.get("arguments")
    return ToolCall(
        _text(name, f"{field}.function.name") if isinstance(name, str) else None,
        _text(arguments, f"{field}.function.arguments") if isinstance(arguments, str) else None,
        _text(kind, f"{field}.type")[:_KIND_SHOWN] if isinstance(kind, str) else "unknown",
    )


def _text(given: object, field: str) -> str:
    if not isinstance(given, str):
        raise InvalidInput(field, given, "text")
    if len(given) > MAX_CHARACTERS:
        raise InvalidInput(field, "longer", f"at most {MAX_CHARACTERS:,} characters")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise InvalidInput(field, given, "text; it holds half of a surrogate pair") from None
    return given
