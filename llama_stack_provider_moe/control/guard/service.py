"""Runs shields for the callers of a server: sessions, telemetry, feedback; the same behind every host's wire."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from opentelemetry import metrics
from opentelemetry.metrics import Meter

from llama_stack_provider_moe.control.guard import host, wire
from llama_stack_provider_moe.control.guard.feedback import Feedback
from llama_stack_provider_moe.control.guard.telemetry import Telemetry
from llama_stack_provider_moe.control.server.bodies import Bodies
from llama_stack_provider_moe.control.server.failures import Failures
from llama_stack_provider_moe.control.server.pools import Pool
from llama_stack_provider_moe.control.server.telemetry import METER
from llama_stack_provider_moe.errors import InvalidInput, MoeError, Unavailable, shorten
from llama_stack_provider_moe.shields import tool_guard
from llama_stack_provider_moe.shields.guard import TRAJECTORY, Guard, Lookup, Who
from llama_stack_provider_moe.shields.messages import Conversation, canonical, of_text
from llama_stack_provider_moe.shields.scores import Scorer
from llama_stack_provider_moe.shields.verdict import Verdict, Violation
from llama_stack_provider_moe.spec.guard_config import GuardConfig, ShieldParams, ToolGuardParams, TrajectoryParams

CHECK_LIMIT_S = 30.0  # longest check of tool calls; its bounds keep it far below
NOT_SCORED = "not_scored"  # category of a text that `on_failure` blocks
MAX_LOGGED = 20_000  # characters of a conversation
MAX_INPUTS = 64  # texts of one moderation
LATE = "the check of the tool calls takes too long; try again"
log = host.logger(__name__)


class Moderated(NamedTuple):
    """The moderation of some texts.

    Attributes:
        id: of this answer.
        model: the shield, as the caller named it.
        verdicts: one for each text, in their order.
    """

    id: str
    model: str
    verdicts: list[Verdict]


class _Threads:
    """The threads of one service, in the form that `control.server.answers` knows."""

    def __init__(self) -> None:
        self.bodies = Bodies()
        self.failures = Failures()

    async def known_failure(self, error: Exception) -> MoeError | None:
        """Return what an error of the host's tells a caller; None means a bug."""
        return host.known_failure(error)


class GuardService:
    """Shields for callers.

    Args:
        config: the provider's configuration.
        scorer: scores conversations; None: there is none.
        meter: for tests; None: the host's.
        end_scorer: ends the scorer's process; it may take seconds.

    Raises:
        InvalidConfig: a file of rules is not valid.
    """

    def __init__(
        self,
        config: GuardConfig,
        scorer: Scorer | None,
        meter: Meter | None = None,
        end_scorer: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._scorer = scorer
        self._end_scorer = end_scorer
        self.guard = _Threads()  # the name that `control.server.answers` knows
        self._checks = Pool("moe-guard", 2, 256, "tool calls", stuck_s=CHECK_LIMIT_S)
        self._readers = Pool("moe-guard-read", 1, 256, "messages", stuck_s=CHECK_LIMIT_S)
        self._writer = Pool("moe-guard-feedback", 1, 64, "flagged conversations")
        self.shields = Guard(config, scorer, self._in_thread)
        self.telemetry = Telemetry(meter or metrics.get_meter(METER), lambda: len(self.shields.sessions))
        self._feedback: Feedback | None = None
        if config.feedback is not None and config.feedback.consent:
            self._feedback = Feedback(config.feedback, self.telemetry.feedback)
        self._say()

    async def close(self) -> None:
        """Accept no more calls; idle threads and the scorer end."""
        await asyncio.to_thread(self._end_scorer)
        for each in (self._checks, self._readers, self._writer, self.guard.bodies, self.guard.failures):
            each.close()

    def refused(self, method: str, route: str, status: int) -> None:
        """Answers with errors are the host's figures (`http.server.request.duration`)."""

    async def health(self) -> wire.GuardHealth:
        """Return whether shields can answer."""
        on_failure, sessions = self.config.on_failure, len(self.shields.sessions)
        if self._scorer is None:
            status: Literal["ok", "degraded"] = "degraded" if self.config.probes else "ok"
            return wire.GuardHealth(status=status, on_failure=on_failure, scorer="none", probes=[], sessions=sessions)
        found = await self._scorer.health()
        return wire.GuardHealth(
            status="ok" if found.status == "ready" else "degraded", on_failure=on_failure, scorer=found.status,
            detail=found.detail or None, probes=list(found.probes), sessions=sessions,
        )  # fmt: skip

    async def run_shield(
        self, shield_id: str, params: ShieldParams, messages: Sequence[object], who: Who, lookup: Lookup
    ) -> Verdict:
        """Return a shield's verdict about messages.

        Args:
            shield_id: id of the shield.
            params: its parameters.
            messages: as JSON has them.
            who: who asks.
            lookup: finds other shields.

        Raises:
            InvalidInput: a message has not the form of one; see `Guard.verdict`.
            Unavailable: too many checks wait.
        """
        conversation = await self._readers.within(CHECK_LIMIT_S, LATE, canonical, messages)
        return await self._checked(shield_id, params, conversation, who, lookup)

    async def moderate(
        self, model: str, shield_id: str, params: ShieldParams, texts: Sequence[str], who: Who, lookup: Lookup
    ) -> Moderated:
        """Return a shield's verdict about each of some texts, as if a user had written each alone.

        Raises:
            InvalidInput: there are no texts or too many, or the shield is a ToolGuard, which would see nothing.
        """
        if isinstance(params, ToolGuardParams):
            raise InvalidInput("model", model, "a shield of another type than tool_guard, because texts have no tool "
                               "calls; call /v1/safety/run-shield with the messages")  # fmt: skip
        if not 1 <= len(texts) <= MAX_INPUTS:
            raise InvalidInput("input", f"{len(texts)} texts", f"1 to {MAX_INPUTS} texts")
        conversations = [of_text(text, f"input[{number}]") for number, text in enumerate(texts)]
        checks = [self._checked(shield_id, params, each, who, lookup) for each in conversations]
        if isinstance(params, TrajectoryParams):
            verdicts = [await check for check in checks]  # the turns of a session have an order
        else:
            verdicts = await asyncio.gather(*checks)  # a scorer takes them together, within one deadline
        return Moderated(f"modr-{uuid.uuid4().hex}", model, verdicts)

    async def _checked(
        self, shield_id: str, params: ShieldParams, conversation: Conversation, who: Who, lookup: Lookup
    ) -> Verdict:
        began = time.monotonic()
        verdict = await self.shields.verdict(shield_id, params, conversation, who, lookup)
        self.telemetry.checked(params.type, shield_id, verdict, time.monotonic() - began)
        if verdict.failed is not None:
            chosen = "allowed" if verdict.violation is None else "blocked"
            log.warning(f"shield {shield_id!r} ({params.type}) has no score ({verdict.failed}); {chosen}")
        if verdict.violation is not None:
            self._flagged(shield_id, verdict, conversation, who)
        return verdict

    def _flagged(self, shield_id: str, verdict: Verdict, conversation: Conversation, who: Who) -> None:
        assert verdict.violation is not None
        rule = verdict.violation.metadata.get("rule")
        log.info(f"shield {shield_id!r}: {verdict.violation.level}, rule {rule!r}")
        if self.config.log_conversations:
            shown = shorten([f"{each.role}: {each.scored_text}" for each in conversation], MAX_LOGGED)
            log.info(f"shield {shield_id!r}: conversation {shown}")
        if self._feedback is not None and verdict.failed is None:
            try:
                self._writer.submit(partial(self._feedback.keep, who.owner, shield_id, conversation))
            except Unavailable:
                self.telemetry.feedback("failed")

    async def _in_thread(self, call: Callable[[], Verdict]) -> Verdict:
        return await self._checks.within(CHECK_LIMIT_S, LATE, call)

    def _say(self) -> None:
        """Say at the start what this provider does, so that a wrong configuration is seen."""
        config = self.config
        kept = "nowhere" if config.feedback is None else str(config.feedback.folder)
        log.info(
            f"moe-guard: without a score: {config.on_failure}; rules: {', '.join(config.rules) or 'none'}; "
            f"probes: {', '.join(config.probes) or 'none'}; flagged conversations are kept {kept}; "
            f"conversations are {'' if config.log_conversations else 'not '}logged"
        )


def result_of(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as OpenAI's result of a moderation: flagged where the level is `error`."""
    violation = verdict.violation
    flagged = violation is not None and violation.level == "error"
    scores = dict(verdict.scores)
    category = None if violation is None else category_of(violation)
    if category is not None:
        scores.setdefault(category, 1.0)
    return {
        "flagged": flagged,
        "categories": {name: flagged and name == category for name in scores},
        "category_scores": scores,
        "user_message": None if violation is None else violation.user_message,
        "metadata": {} if violation is None else {"level": violation.level, **violation.metadata},
    }


def category_of(violation: Violation) -> str:
    """Return the category of a moderation that a violation belongs to."""
    about = violation.metadata
    if "failed" in about:
        return NOT_SCORED
    return {"tool_guard": tool_guard.CATEGORY, "trajectory": TRAJECTORY}.get(
        str(about["shield"]), str(about.get("probe"))
    )
