"""Documents of the server's API about playgrounds, prompts and answers; see `documents`."""

from typing import Literal, TypedDict

type Side = Literal["on", "off"]


class SentPrompt(TypedDict):
    """A prompt that a playground will answer."""

    job_uuid: str
    number: int
    ahead: int


class LoadedModel(TypedDict):
    """What the model of a playground has."""

    has_adapter: bool
    moe_layers: list[int]
    experts: int
    top_k: int
    positions: int | None


class PromptLine(TypedDict):
    """A prompt in a list."""

    number: int
    status: str


class Playground(TypedDict):
    """A playground and its prompts; `loaded` is None until the model is loaded."""

    job_uuid: str
    status: str
    is_open: bool
    loaded: LoadedModel | None
    idle_s: int
    max_new_tokens: int
    data: list[PromptLine]


class RoutedToken(TypedDict):
    """One token of an answer, and its experts in each MoE layer."""

    id: int
    token: str
    experts: list[list[int]]
    weights: list[list[float]]


class SideAnswer(TypedDict):
    """An answer with the adapter on or off; what is None is not known before its end."""

    prompt_tokens: int
    text: str
    tokens: int | None
    reason: str | None
    seconds: float | None
    routing: list[RoutedToken]


class PromptAnswer(TypedDict):
    """A prompt and its answer so far."""

    job_uuid: str
    number: int
    status: str
    prompt: dict[str, object]
    answers: dict[Side, SideAnswer]
    error: str | None


class StoppedPrompt(TypedDict):
    """A prompt that was stopped."""

    job_uuid: str
    number: int
    status: str


class Piece(TypedDict, total=False):
    """A piece of an answer; its type says which of the other keys it has.

    Keys:
        type: begun, text, routed, answered or ended.
        side: on or off, for every type but `ended`.
        text: more text; all of it for `answered`.
        id, token, experts, weights: of `routed`.
        prompt_tokens: of `begun`.
        tokens, reason, seconds: of `answered`.
        error: of `ended`.
    """

    type: str
    side: Side
    text: str
    id: int
    token: str
    experts: list[list[int]]
    weights: list[list[float]]
    prompt_tokens: int
    tokens: int
    reason: str
    seconds: float
    error: str | None
