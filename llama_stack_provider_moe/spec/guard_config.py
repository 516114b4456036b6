"""`GuardConfig`: the `config:` of the provider `inline::moe-guard`, and the `params` of its shields."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, TypeAdapter, field_validator, model_validator

from llama_stack_provider_moe.spec import server_config_rules
from llama_stack_provider_moe.spec.blocks import Block
from llama_stack_provider_moe.spec.feedback_config import FeedbackConfig
from llama_stack_provider_moe.spec.options import PROJECT_PATTERN
from llama_stack_provider_moe.spec.scorer_config import MOST_PROBES, PROBE_NAME_PATTERN, ScorerConfig
from llama_stack_provider_moe.spec.server_config import HOST_NAME_PATTERN

SHIELD_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$"
SHIELD_WORDS = "1 to 128 letters, digits and . _ : / -, the first a letter or a digit"
NAME_PATTERN = PROJECT_PATTERN
Level = Literal["info", "warn", "error"]
OnFailure = Literal["block", "allow"]
Scored = Literal["last_message", "conversation", "both"]
ShieldName = Annotated[str, Field(pattern=SHIELD_PATTERN)]
FileName = Annotated[str, Field(pattern=NAME_PATTERN)]


def own_id(other: str) -> str:
    """What is expected of the `provider_shield_id` of a shield where shield `other` has the same."""
    return f"an id of its own, because moderations name shields by it; shield {other!r} has it"


class ToolGuardParams(Block):
    """ToolGuard: the tool calls of the last assistant message, against rules."""

    type: Literal["tool_guard"] = Field(description="Type of the shield.")
    rules: str = Field(
        default="default", pattern=NAME_PATTERN, description="Name of a file in `rules` of the provider."
    )


class RepMonitorParams(Block):
    """RepMonitor: a probe on a model's hidden states scores the conversation."""

    type: Literal["rep_monitor"] = Field(description="Type of the shield.")
    probe: str = Field(pattern=PROBE_NAME_PATTERN, description="Name of a probe in `probes` of the provider.")
    scored: Scored = Field(
        default="conversation",
        description="What is scored, each by the views that the probe's card names: all messages, the last message "
        "alone, or the worse of both.",
    )
    deadline_s: float = Field(default=10.0, gt=0, le=300, description="Seconds in which there must be a score.")
    on_failure: OnFailure | None = Field(
        default=None,
        description="What to answer without a score; left out: the provider's `on_failure`. An input that the probe "
        "can't score is a violation in any case, because its sender chooses it.",
    )
    other_parts: OnFailure = Field(
        default="block", description="What to answer to images, sound and files, which a probe can't read."
    )
    level: Level = Field(default="error", description="Level of a violation.")
    message: str = Field(
        default="This conversation can't go on here.", max_length=500, description="Message for the user."
    )


class TrajectoryParams(Block):
    """TrajectoryAnalyzer: what the scores of other shields add up to in a session."""

    type: Literal["trajectory"] = Field(description="Type of the shield.")
    shields: list[ShieldName] = Field(
        min_length=1, max_length=8, description="Shields that are run, and whose largest score is the turn's."
    )
    half_life_s: float = Field(
        default=600.0, gt=0, le=86400 * 365, description="Seconds in which the sum of scores decays by half."
    )
    max_score: float | None = Field(
        default=None, gt=0, le=1, description="Score above which a session stays refused; left out: any."
    )
    max_sum: float | None = Field(
        default=None, gt=0, le=1e6, description="Decayed sum above which a session is refused; left out: any."
    )
    no_session: Literal["refuse", "first_message"] = Field(
        default="refuse",
        description="A request that names no session: `refuse` answers 400; `first_message` takes the beginning of the "
        "conversation, up to the first message of the user, for its name.",
    )
    level: Level = Field(default="error", description="Level of a violation.")
    message: str = Field(
        default="This conversation can't go on here.", max_length=500, description="Message for the user."
    )

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.max_score is None and self.max_sum is None:
            raise ValueError("max_score and max_sum are both left out; expected at least one of them")
        if len(set(self.shields)) < len(self.shields):
            raise ValueError("shields: a shield is named twice; expected each once")
        return self


ShieldParams = ToolGuardParams | RepMonitorParams | TrajectoryParams
TaggedParams = Annotated[ToolGuardParams | RepMonitorParams | TrajectoryParams, Discriminator("type")]
SHIELD_PARAMS: TypeAdapter[ShieldParams] = TypeAdapter(TaggedParams)
PARAMS: dict[str, type[Block]] = {
    "tool_guard": ToolGuardParams, "rep_monitor": RepMonitorParams, "trajectory": TrajectoryParams,
}  # fmt: skip


class SessionsConfig(Block):
    """Sessions of TrajectoryAnalyzer, in the memory of one server process."""

    most: int = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Number of sessions that are kept. For a new one, the user with the most sessions loses the least "
        "recently used of them.",
    )
    most_of_owner: int = Field(
        default=100_000,
        ge=1,
        le=10_000_000,
        description="Number of sessions that are kept of one user; the least recently used of theirs end.",
    )
    ttl_s: float = Field(
        default=86_400.0, gt=0, le=86400 * 365, description="Seconds without a turn after which a session ends."
    )


class GuardConfig(Block):
    """The provider's configuration."""

    on_failure: OnFailure = Field(
        description="What a shield answers when it has no score because its scorer is down, busy or late: `block` "
        "answers a violation, `allow` answers none and counts it. There is no default: the operator chooses."
    )
    rules: dict[FileName, Path] = Field(
        default_factory=dict, max_length=100, description="Files of ToolGuard's rules, by the name that shields use."
    )
    probes: dict[Annotated[str, Field(pattern=PROBE_NAME_PATTERN)], Path] = Field(
        default_factory=dict,
        max_length=MOST_PROBES,
        description="Folders of probes, with probe.json and probe.safetensors, by the name that shields use. Without "
        "any, no process that scores is started.",
    )
    scorer: ScorerConfig = Field(default_factory=ScorerConfig, description="The process that scores with the probes.")
    state_dir: Path = Field(
        default=Path("~/.llama/moe-guard"),
        validate_default=True,
        description="Folder for the scorer's socket and log; several servers that share it share one scorer.",
    )
    shields: dict[ShieldName, TaggedParams] = Field(
        default_factory=dict,
        max_length=1000,
        description="Shields on a host that has no registry of shields (OGX), by their id. On Llama Stack they are "
        "`registered_resources.shields`.",
    )
    default_shield: str | None = Field(
        default=None,
        pattern=SHIELD_PATTERN,
        description="Shield of a moderation that names no model, on OGX; left out: it is refused. On Llama Stack this "
        "is `safety.default_shield_id`.",
    )
    sessions: SessionsConfig = Field(default_factory=SessionsConfig, description="Sessions of TrajectoryAnalyzer.")
    feedback: FeedbackConfig | None = Field(
        default=None, description="Where flagged conversations are kept; left out: nowhere."
    )
    log_conversations: bool = Field(
        default=False, description="Write flagged conversations to the server's log; false: only counts and rules."
    )
    max_body_bytes: int = Field(
        default=8 << 20, ge=1 << 10, le=1 << 28, description="Largest body of a request, in bytes."
    )
    allowed_hosts: list[Annotated[str, Field(pattern=HOST_NAME_PATTERN, max_length=253)]] = Field(
        default_factory=list,
        max_length=64,
        description="On OGX: names, beside localhost, under which a server without authentication answers requests "
        "over a loopback address. Others get a 403, against DNS rebinding.",
    )

    _state_dir = field_validator("state_dir", mode="after")(staticmethod(server_config_rules.exclusive_folder))
    _no_state_dir = field_validator("state_dir", mode="before")(staticmethod(server_config_rules.not_blank))

    @field_validator("rules", "probes", mode="before")
    @classmethod
    def _blank(cls, given: object) -> object:
        for each in given.values() if isinstance(given, dict) else ():
            server_config_rules.not_blank(each)
        return given

    @field_validator("rules", "probes", mode="after")
    @classmethod
    def _absolute(cls, given: dict[str, Path]) -> dict[str, Path]:
        return {name: server_config_rules.absolute(path) for name, path in given.items()}

    @model_validator(mode="after")
    def _named(self) -> Self:
        for shield_id, params in self.shields.items():
            self.must_have(params, f"shields.{shield_id}")
            for other in params.shields if isinstance(params, TrajectoryParams) else ():
                found = self.shields.get(other)
                if found is None or isinstance(found, TrajectoryParams):
                    raise ValueError(f"shields.{shield_id}.shields: {other!r} is not valid; expected the id of another "
                                     "shield here, of type tool_guard or rep_monitor")  # fmt: skip
        if self.default_shield is not None and self.default_shield not in self.shields:
            known = ", ".join(map(repr, self.shields)) or "none"
            raise ValueError(f"default_shield: {self.default_shield!r} is not valid; expected a shield of `shields`: "
                             f"{known}")  # fmt: skip
        if self.default_shield is not None and isinstance(self.shields[self.default_shield], ToolGuardParams):
            raise ValueError(f"default_shield: {self.default_shield!r} is not valid; expected a shield of another type "
                             "than tool_guard, because a moderation has no tool calls")  # fmt: skip
        return self

    def must_have(self, params: ShieldParams, field: str) -> None:
        """Raise ValueError where a shield names rules or a probe that this configuration does not have.

        Args:
            params: of the shield.
            field: the caller's name for them.
        """
        for name, wanted, known in (
            ("rules", getattr(params, "rules", None), self.rules),
            ("probe", getattr(params, "probe", None), self.probes),
        ):
            if wanted is not None and wanted not in known:
                has = ", ".join(map(repr, known)) or "none"
                raise ValueError(f"{field}.{name}: {wanted!r} is not valid; expected a name of the provider's "
                                 f"`{name.removesuffix('s')}s`: {has}")  # fmt: skip
