"""The canonical rows: what the server writes into a job's folder and what training reads, one JSON object per line.

    Conversation  {"messages": [...], "tools"?: [...], "chat_template_kwargs"?: {...}}
    TextRow       {"text": str}                                          continued pre-training: no chat template
    Preference    {"prompt": [...], "chosen": [...], "rejected": [...], "tools"?, "chat_template_kwargs"?}
    PromptRow     {"messages": [...], "item": {...}, "tools"?, "chat_template_kwargs"?}     GRPO
    ThumbRow      {"prompt": [...], "completion": [...], "label": bool, "tools"?, "chat_template_kwargs"?}      KTO

A message has a role and content, and the keys below where the data had them. Content is a text; in a user message with
images, a list of parts (`rows.images`). Every format becomes messages, so that the
model's chat template applies to all of them in the same way.
"""

from typing import Literal, NotRequired, TypedDict, get_args

from llama_stack_provider_moe.spec.rows.images import Content

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


class FunctionCall(TypedDict):
    """A function's name, and its arguments by name."""

    name: str
    arguments: dict[str, object]


class ToolCall(TypedDict):
    """One call in an assistant's message."""

    type: Literal["function"]
    id: NotRequired[str]
    function: FunctionCall


class Message(TypedDict):
    """One message. `content` is None only in an assistant's message with tool calls, and a list only with images."""

    role: Role
    content: Content
    reasoning: NotRequired[str]  # the assistant's thinking, whatever the data and the chat template call it
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    weight: NotRequired[Literal[0, 1]]  # 0: an assistant's message that is context and never learnt; missing: 1


class Conversation(TypedDict):
    """A row of messages. `tools` are functions as chat templates take them."""

    messages: list[Message]
    tools: NotRequired[list[dict[str, object]]]
    chat_template_kwargs: NotRequired[dict[str, object]]  # variables of the chat template, such as enable_thinking


class TextRow(TypedDict):
    """A row of plain text, all of which is learnt."""

    text: str


class Preference(TypedDict):
    """Two answers to one prompt. The prompt ends with a user or tool message; each answer is the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: NotRequired[list[dict[str, object]]]
    chat_template_kwargs: NotRequired[dict[str, object]]


class PromptRow(TypedDict):
    """A prompt to generate from. `item` is what graders read: the row's own columns, and `gold`, its own answer."""

    messages: list[Message]
    item: dict[str, object]
    tools: NotRequired[list[dict[str, object]]]
    chat_template_kwargs: NotRequired[dict[str, object]]


class ThumbRow(TypedDict):
    """A prompt, an answer to it, and whether that is desirable. The answer is all after the last user's turn."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: NotRequired[list[dict[str, object]]]
    chat_template_kwargs: NotRequired[dict[str, object]]


CanonicalRow = Conversation | TextRow | Preference | PromptRow | ThumbRow
