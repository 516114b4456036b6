"""Runs a shield of any type: the same for a server's provider and for the command line."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidBody, InvalidConfig, InvalidInput, shorten
from llama_stack_provider_moe.shields.messages import Conversation
from llama_stack_provider_moe.shields.rules import read_rules
from llama_stack_provider_moe.shields.scores import Score, Scorer, ScorerFailed
from llama_stack_provider_moe.shields.tool_guard import ToolGuard
from llama_stack_provider_moe.shields.trajectory import MAX_SESSION, Key, Sessions, State
from llama_stack_provider_moe.shields.verdict import LEVELS, Verdict, Violation
from llama_stack_provider_moe.spec.guard_config import (
    PARAMS,
    SHIELD_PARAMS,
    GuardConfig,
    OnFailure,
    RepMonitorParams,
    ShieldParams,
    ToolGuardParams,
    TrajectoryParams,
)
from llama_stack_provider_moe.spec.validation_errors import invalid_body

TRAJECTORY = "trajectory"
NOT_CHECKED = "This could not be checked, so it can't go on here."
_DIGITS = 6  # of a score in an answer


class Who(NamedTuple):
    """Who asks.

    Attributes:
        owner: whom sessions belong to, and whose conversations wait for a score.
        principal: the name that rules see.
        session: the caller's name for the conversation; None: it gave none.
        is_named: whether the host knows who the caller is; those without a name share an owner.
    """

    owner: str
    principal: str
    session: str | None
    is_named: bool = True


# Runs a call that may take a second, without holding up the caller's event loop.
type InThread = Callable[[Callable[[], Verdict]], Awaitable[Verdict]]
# Finds the parameters of a shield by its id.
type Lookup = Callable[[str], Awaitable[ShieldParams]]


async def here(call: Callable[[], Verdict]) -> Verdict:
    """Run a call in this thread, where nobody else waits."""
    return call()


class Guard:
    """The shields of one configuration.

    Args:
        config: the configuration.
        scorer: scores conversations; None: there is none, and a RepMonitor fails.
        in_thread: runs ToolGuard's checks.
        clock: seconds that never go back.

    Raises:
        InvalidConfig: a file of rules is not valid.
    """

    def __init__(
        self,
        config: GuardConfig,
        scorer: Scorer | None,
        in_thread: InThread = here,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._scorer = scorer
        self._in_thread = in_thread
        self.sessions = Sessions(config.sessions.most, config.sessions.ttl_s, clock, config.sessions.most_of_owner)
        self._tool_guards: dict[str, ToolGuard] = {}
        problems: list[str] = []
        for name, path in config.rules.items():
            try:
                self._tool_guards[name] = ToolGuard(read_rules(path, f"rules.{name}"))
            except InvalidConfig as error:
                problems += [f"rules.{name}: {path}: {each}" for each in error.problems]
            except InvalidInput as error:
                problems.append(str(error))
        if problems:
            raise InvalidConfig("moe-guard", problems)

    def params(self, given: Mapping[str, object] | None, field: str = "params") -> ShieldParams:
        """Return the parameters of a shield.

        Args:
            given: as a caller wrote them.
            field: the caller's name for them.

        Raises:
            InvalidInput: they are not valid, or name rules or a probe that this server does not have.
        """
        return params_of(self.config, given, field)

    async def verdict(
        self, shield_id: str, params: ShieldParams, conversation: Conversation, who: Who, lookup: Lookup
    ) -> Verdict:
        """Return a shield's verdict about a conversation.

        Args:
            shield_id: id of the shield.
            params: its parameters.
            conversation: the messages.
            who: who asks.
            lookup: finds the shields that a trajectory adds up.

        Raises:
            InvalidInput: a trajectory was asked without a session, or adds up a shield that is not there.
        """
        if isinstance(params, ToolGuardParams):
            guard = self._tool_guards[params.rules]
            return await self._in_thread(lambda: guard.verdict(conversation, who.principal))
        if isinstance(params, RepMonitorParams):
            return await self._probed(params, conversation, who)
        return await self._trajectory(shield_id, params, conversation, who, lookup)

    async def _probed(self, params: RepMonitorParams, conversation: Conversation, who: Who) -> Verdict:
        views = scored_views(params, conversation)
        others = sorted({kind for each in conversation for kind in each.other_parts})
        if others and params.other_parts == "block":
            about = {"rule": "other_parts", "parts": others[:8]}
            return _flagged(params, 1.0, about, NOT_CHECKED)
        try:
            if self._scorer is None:
                raise ScorerFailed("down", "this server has no scorer")
            owner = who.owner if who.is_named else None
            scores = await self._scorer.score(params.probe, views, params.deadline_s, owner) if views else []
        except ScorerFailed as error:
            # A sender can cause a refusal, so it never lets anything through.
            chosen = "block" if error.reason == "refused" else params.on_failure or self.config.on_failure
            return failed(params, chosen, error.reason)
        if not scores:  # no text at all
            return Verdict(None, 0.0, {params.probe: 0.0})
        return _of_score(params, max(scores, key=lambda each: (each.is_flagged, each.probability)))

    async def _trajectory(
        self, shield_id: str, params: TrajectoryParams, conversation: Conversation, who: Who, lookup: Lookup
    ) -> Verdict:
        session = who.session if who.session is not None else _session_of(params, conversation)
        if not 1 <= len(session) <= MAX_SESSION:
            raise InvalidInput("session", session, f"1 to {MAX_SESSION} characters")
        inner: dict[str, ShieldParams] = {}
        for name in params.shields:
            inner[name] = await lookup(name)
            if isinstance(inner[name], TrajectoryParams):
                raise InvalidInput(f"shields: {name}", "trajectory", "a shield of type tool_guard or rep_monitor")
        verdicts = dict(
            zip(
                inner,
                await asyncio.gather(
                    *(self.verdict(name, each, conversation, who, lookup) for name, each in inner.items())
                ),
                strict=True,
            )
        )
        scores = {name: each.score for name, each in verdicts.items() if each.failed is None}
        violations = {name: each.violation for name, each in verdicts.items() if each.violation is not None}
        found: Violation | None = None
        categories = {name: score for each in verdicts.values() for name, score in each.scores.items()}
        turn_score = max(scores.values(), default=0.0)
        if scores:
            state = self.sessions.add(Key(who.owner, shield_id, session), scores, params.half_life_s)
            found = _over(params, state)
            categories[TRAJECTORY] = round(min(1.0, _share(params, state)), _DIGITS)
        for name, violation in violations.items():  # a caller may run the trajectory alone
            if found is None or LEVELS.index(violation.level) > LEVELS.index(found.level):
                found = violation._replace(metadata={**violation.metadata, "shield_id": name})
        why = next((each.failed for each in verdicts.values() if each.failed is not None), None)
        return Verdict(found, turn_score, categories, why)


def params_of(config: GuardConfig, given: Mapping[str, object] | None, field: str = "params") -> ShieldParams:
    """Return the parameters of a shield; see `Guard.params`.

    Args:
        config: has the rules and probes that they may name.
        given: as a caller wrote them.
        field: the caller's name for them.
    """
    kind = (given or {}).get("type")
    if not isinstance(kind, str) or kind not in PARAMS:
        raise InvalidInput(f"{field}.type", kind, f"one of {', '.join(PARAMS)}")
    try:
        found = SHIELD_PARAMS.validate_python(given)
    except ValidationError as error:
        errors = [{**each, "loc": each["loc"][1:]} for each in error.errors(include_url=False)]
        raise invalid_body(errors, PARAMS[kind], lambda path: f"{field}.{path}".rstrip(".")) from None
    try:
        config.must_have(found, field)
    except ValueError as error:
        raise InvalidBody([str(error)]) from None
    return found


def scored_views(params: RepMonitorParams, conversation: Conversation) -> list[list[dict[str, str]]]:
    """Return what a probe scores: the whole conversation, its last message, or both; messages without text left out."""
    whole = [{"role": each.role, "content": each.scored_text} for each in conversation if each.scored_text.strip()]
    views = {"conversation": [whole], "last_message": [whole[-1:]], "both": [whole, whole[-1:]]}[params.scored]
    if len(whole) == 1:
        views = views[:1]
    return [each for each in views if each]


def failed(params: RepMonitorParams, chosen: OnFailure, reason: str) -> Verdict:
    """Return what the operator chose for a conversation that has no score.

    Args:
        params: of the shield.
        chosen: block or allow.
        reason: why there is no score.
    """
    if chosen == "allow":
        return Verdict(None, 0.0, {}, reason)
    about: dict[str, object] = {"shield": params.type, "probe": params.probe, "rule": "on_failure", "failed": reason}
    return Verdict(Violation(params.level, NOT_CHECKED, about), 1.0, {}, reason)


def _of_score(params: RepMonitorParams, score: Score) -> Verdict:
    probability = round(score.probability, _DIGITS)
    if not score.is_flagged:
        return Verdict(None, probability, {params.probe: probability})
    about = {"rule": "threshold", "score": probability, "threshold": round(score.threshold, _DIGITS),
             "layer": score.layer}  # fmt: skip
    return _flagged(params, probability, about, params.message)


def _flagged(params: RepMonitorParams, score: float, about: Mapping[str, object], message: str) -> Verdict:
    metadata = {"shield": params.type, "probe": params.probe, **about}
    return Verdict(Violation(params.level, message, metadata), score, {params.probe: score})


def _over(params: TrajectoryParams, state: State) -> Violation | None:
    """The violation of a session that is over a limit."""
    if params.max_score is not None and state.maximum > params.max_score:
        rule, limit, value, turn = "max_score", params.max_score, state.maximum, state.of
    elif params.max_sum is not None and state.decayed_sum > params.max_sum:
        rule, limit, value, turn = "max_sum", params.max_sum, state.decayed_sum, state.latest
    else:
        return None
    metadata: dict[str, object] = {
        "shield": params.type, "rule": rule, "limit": limit, "value": round(value, _DIGITS),
        "maximum": round(state.maximum, _DIGITS), "decayed_sum": round(state.decayed_sum, _DIGITS),
        "turns": state.turns,
        "pushed_by": {"shield_id": turn.shield, "score": round(turn.score, _DIGITS), "turn": turn.number},
    }  # fmt: skip
    return Violation(params.level, params.message, metadata)


def _share(params: TrajectoryParams, state: State) -> float:
    """How much of its limits a session has used up: 1 is the limit."""
    by_score = 0.0 if params.max_score is None else state.maximum / params.max_score
    by_sum = 0.0 if params.max_sum is None else state.decayed_sum / params.max_sum
    return max(by_score, by_sum)


def _session_of(params: TrajectoryParams, conversation: Conversation) -> str:
    """The name of a session that the caller gave none: a hash of how the conversation begins."""
    if params.no_session == "refuse":
        raise InvalidInput("session", None, "the session's name: `metadata.session_id` of the request, header "
                           "X-Moe-Session, or `moe_session` of the host's provider data (`--session` of `guard run`); "
                           "or a shield with `no_session: first_message`")  # fmt: skip
    digest = hashlib.sha256()
    for message in conversation:
        digest.update(f"{message.role}\0{message.text}\0".encode())
        if message.role == "user":
            break
    return f"begins:{digest.hexdigest()}"


def unknown_shield(shield_id: str, known: Sequence[str]) -> InvalidInput:
    """Return the error for a shield that is not there."""
    return InvalidInput("shield_id", shield_id, f"one of {shorten(list(known), 300)}")
