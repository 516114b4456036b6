"""The provider on Llama Stack 0.6.1 and 0.7.3, whose safety API and registry of shields are the same on the wire.

The host's router parses bodies, finds the shield's provider, and answers a ValueError with 400.
"""

import re
from collections.abc import Awaitable
from typing import Any

from llama_stack_provider_moe.control.guard import host
from llama_stack_provider_moe.control.guard.service import GuardService, result_of
from llama_stack_provider_moe.errors import InvalidInput, MoeError
from llama_stack_provider_moe.shields.guard import unknown_shield
from llama_stack_provider_moe.shields.verdict import Verdict
from llama_stack_provider_moe.spec.guard_config import (
    SHIELD_PATTERN,
    SHIELD_WORDS,
    ShieldParams,
    TrajectoryParams,
    own_id,
)


class SafetyProvider:
    """Llama Stack's `Safety`, with the calls that register shields.

    Args:
        service: runs the shields.

    Attributes:
        shield_store: the host's registry, which it sets before it calls anything.
    """

    shield_store: host.ShieldStore

    def __init__(self, service: GuardService) -> None:
        self._service = service
        self._registered: dict[str, ShieldParams] = {}  # by the identifier; those that this process was told of

    async def initialize(self) -> None:
        """Nothing to do: threads start on demand."""

    async def shutdown(self) -> None:
        """Stop accepting checks."""
        await self._service.close()

    async def register_shield(self, shield: host.Shield) -> host.Shield:
        """Check a shield before the host registers it.

        Raises:
            InvalidInput: its ids or parameters are not valid, or a trajectory adds up a shield that is not registered.
        """
        await self._check_ids(shield)
        params = self._service.shields.params(shield.params)
        for name in params.shields if isinstance(params, TrajectoryParams) else ():
            other = self._registered.get(name) or await self._lookup(name)
            if isinstance(other, TrajectoryParams):
                raise InvalidInput("params.shields", name, "shields of type tool_guard or rep_monitor")
        self._registered[shield.identifier] = params
        return shield

    async def _check_ids(self, shield: host.Shield) -> None:
        """Refuse ids that no request can name, or that would name two shields; ids that are stored stay."""
        stored = await self._shields()
        if any(each.identifier == shield.identifier for each in stored):
            return
        if re.fullmatch(SHIELD_PATTERN, shield.identifier) is None:
            raise InvalidInput("shield_id", shield.identifier, SHIELD_WORDS)
        model = shield.provider_resource_id
        for each in stored:
            if each.provider_resource_id == model:
                raise InvalidInput("provider_shield_id", model, own_id(each.identifier))

    async def unregister_shield(self, identifier: str) -> None:
        """Forget a shield."""
        self._registered.pop(identifier, None)

    async def run_shield(self, request: Any) -> object:
        """Run a shield on messages; `request` and the answer are the host's types."""
        shield = await self._shield(request.shield_id)
        messages = [each.model_dump(exclude_none=True) for each in request.messages]
        verdict = await _as_value_error(
            self._service.run_shield(shield.identifier, self._params(shield), messages, host.who(), self._lookup)
        )
        return host.models().RunShieldResponse(violation=_violation(verdict))

    async def run_moderation(self, request: Any) -> object:
        """Run a shield on texts; the host gives `provider_resource_id` for `model`."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        shield = await self._shield_of_model(request.model)
        moderated = await _as_value_error(
            self._service.moderate(
                request.model, shield.identifier, self._params(shield), texts, host.who(), self._lookup
            )
        )
        types = host.models()
        results = []
        for verdict in moderated.verdicts:
            result = result_of(verdict)
            applied = {name: ["text"] for name in result["category_scores"]}
            results.append(types.ModerationObjectResults(**result, category_applied_input_types=applied))
        return types.ModerationObject(id=moderated.id, model=moderated.model, results=results)

    async def _shields(self) -> list[host.Shield]:
        return (await self.shield_store.list_shields()).data

    async def _shield(self, shield_id: str) -> host.Shield:
        shields = await self._shields()
        for each in shields:
            if each.identifier == shield_id:
                return each
        raise unknown_shield(shield_id, [each.identifier for each in shields])

    async def _shield_of_model(self, model: str | None) -> host.Shield:
        shields = await self._shields()
        for each in shields:
            if each.provider_resource_id == model:
                return each
        raise InvalidInput("model", model, "the provider_shield_id of a registered shield")

    async def _lookup(self, shield_id: str) -> ShieldParams:
        return self._params(await self._shield(shield_id))

    def _params(self, shield: host.Shield) -> ShieldParams:
        # Read again: a registry outlives the configuration that a shield was checked against.
        return self._service.shields.params(shield.params, f"shield {shield.identifier!r}: params")


async def _as_value_error[T](answer: Awaitable[T]) -> T:
    """Await an answer; the host knows ValueError, and would drop the connection on another error of ours."""
    try:
        return await answer
    except MoeError as error:
        if isinstance(error, ValueError):
            raise
        raise host.Busy(str(error)) from None


def _violation(verdict: Verdict) -> object:
    if verdict.violation is None:
        return None
    types = host.models()
    level = types.ViolationLevel(verdict.violation.level)
    return types.SafetyViolation(
        violation_level=level, user_message=verdict.violation.user_message, metadata=verdict.violation.metadata
    )
