"""How a server runs the process that scores conversations with probes."""

import sys

from pydantic import Field, field_validator

from llama_stack_provider_moe.spec import server_config_rules
from llama_stack_provider_moe.spec.blocks import Block

PROBE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
MOST_PROBES = 16


class ScorerLimits(Block):
    """The scorer process: its interpreter, and how long it may take."""

    python: str = Field(
        default=sys.executable,
        min_length=1,
        max_length=4096,
        description="Interpreter of the environment with torch that runs the scorer.",
    )
    queue: int = Field(
        default=256, ge=1, le=100_000, description="Conversations that may wait; further ones are not scored."
    )
    queue_of_owner: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Conversations of one user that may wait, so that nobody fills the queue alone; one request of a "
        "user who has none waiting may be larger. Left out: half of `queue`, and for callers without a name all of it.",
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="Texts in one pass through a model.")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Processor threads of the scorer; left out: torch decides."
    )
    ping_s: float = Field(
        default=2.0, ge=0.05, le=60, description="Seconds between two checks that the scorer answers."
    )
    hung_after_s: float = Field(
        default=30.0,
        ge=0.2,
        le=3600,
        description="Seconds without an answer to a check after which the scorer is killed and replaced; longer than "
        "its longest batch.",
    )
    load_s: float = Field(
        default=900.0, ge=1, le=86_400, description="Seconds after its start within which the scorer must answer."
    )


class ScorerConfig(ScorerLimits):
    """The scorer process of a provider of shields."""

    child_env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables to set for the scorer; from the server it inherits only what torch and the "
        "hub's cache need.",
    )

    _secrets = field_validator("child_env", mode="after")(staticmethod(server_config_rules.without_secrets))
