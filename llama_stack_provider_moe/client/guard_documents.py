"""Types of the safety API's documents, as the clients get them."""

from typing import Literal, TypedDict


class ShieldDocument(TypedDict):
    """A shield of a server."""

    identifier: str
    provider_id: str
    provider_resource_id: str
    params: dict[str, object]


class ShieldList(TypedDict):
    """The shields of a server."""

    data: list[ShieldDocument]


class ViolationDocument(TypedDict):
    """What a shield objects to."""

    violation_level: Literal["info", "warn", "error"]
    user_message: str | None
    metadata: dict[str, object]


class RunShieldAnswer(TypedDict):
    """The answer of one shield."""

    violation: ViolationDocument | None


class ShieldVerdict(TypedDict):
    """The answer of one shield, with its id."""

    shield_id: str
    violation: ViolationDocument | None
