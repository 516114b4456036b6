"""The routes on OGX, which has no safety API: that of Llama Stack, and OpenAI's moderations.

    POST /v1/safety/run-shield
    POST /v1/moderations
    GET  /v1/shields, /v1/shields/{id}
    GET  /v1/safety/health             public

The responses provider of OGX calls the second (`moderation_endpoint`) and treats every error as a refusal.
"""

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Header
from pydantic import WrapValidator

from llama_stack_provider_moe.control.guard import host, wire
from llama_stack_provider_moe.control.guard.service import GuardService, Moderated, result_of
from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.answers import answers_of
from llama_stack_provider_moe.control.server.schemas import documented_refusals
from llama_stack_provider_moe.control.server.wire import Error
from llama_stack_provider_moe.errors import InvalidInput, NotFound
from llama_stack_provider_moe.shields.guard import unknown_shield
from llama_stack_provider_moe.shields.verdict import Verdict
from llama_stack_provider_moe.spec.guard_config import ShieldParams
from llama_stack_provider_moe.spec.validation_errors import validated

if TYPE_CHECKING:
    ShieldBody = object
    ModerationBody = object
else:
    # The document has the real types; a thread validates bodies, which may be megabytes.
    _AS_IT_CAME = WrapValidator(lambda body, _: body)
    ShieldBody = Annotated[wire.RunShieldBody, _AS_IT_CAME, Body()]
    ModerationBody = Annotated[wire.ModerationBody, _AS_IT_CAME, Body()]
Session = Annotated[
    str | None, Header(alias="X-Moe-Session", max_length=256, description="Name of the session of a trajectory.")
]
REFUSALS = documented_refusals(Error, (
        HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE,
))  # fmt: skip


class SafetyService:
    """The safety API of a host without one: the shields of the configuration.

    Args:
        service: runs the shields.
    """

    def __init__(self, service: GuardService) -> None:
        self.service = service
        self.config = service.config

    async def initialize(self) -> None:
        """Nothing to do: threads start on demand."""

    async def shutdown(self) -> None:
        """Stop accepting checks."""
        await self.service.close()

    async def run_shield(self, body: object, session: str | None) -> wire.RunShieldAnswer:
        """Run a shield on messages."""
        asked = await self.service.guard.bodies.run(0, validated, wire.RunShieldBody, body)
        params = await self.lookup(asked.shield_id)
        who = host.who(session_of(session, asked.metadata))
        verdict = await self.service.run_shield(asked.shield_id, params, asked.messages, who, self.lookup)
        return wire.RunShieldAnswer(violation=_violation(verdict))

    async def moderate(self, body: object, session: str | None) -> wire.Moderation:
        """Run a shield on texts."""
        asked = await self.service.guard.bodies.run(0, validated, wire.ModerationBody, body)
        model = asked.model if asked.model is not None else self.config.default_shield
        if model is None:
            raise InvalidInput("model", None, f"the id of a shield, because this server has no default_shield: "
                               f"{', '.join(self.config.shields) or 'it has none'}")  # fmt: skip
        if model not in self.config.shields:
            known = ", ".join(self.config.shields) or "this server has none"
            raise InvalidInput("model", model, f"the id of a shield: {known}")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        params = self.config.shields[model]
        who = host.who(session_of(session, asked.metadata))
        return _moderation(await self.service.moderate(model, model, params, texts, who, self.lookup))

    async def lookup(self, shield_id: str) -> ShieldParams:
        """Return the parameters of a shield.

        Raises:
            InvalidInput: there is none of this id.
        """
        if shield_id not in self.config.shields:
            raise unknown_shield(shield_id, list(self.config.shields))
        return self.config.shields[shield_id]

    def shield(self, shield_id: str) -> wire.Shield:
        """Return a shield.

        Raises:
            NotFound: there is none of this id.
        """
        if shield_id not in self.config.shields:
            raise NotFound(f"shield {shield_id!r} does not exist")
        params = self.config.shields[shield_id].model_dump(mode="json")
        return wire.Shield(identifier=shield_id, provider_resource_id=shield_id, params=params)


def create_router(impl: SafetyService) -> APIRouter:
    """Return a router with all routes of `impl`."""
    router = APIRouter(
        prefix="/v1", tags=["Safety"], route_class=answers_of(impl.service, knows_query=True), responses=REFUSALS
    )

    @router.post("/safety/run-shield", summary="Run a shield on messages.")
    async def run_shield(body: ShieldBody, session: Session = None) -> wire.RunShieldAnswer:
        return await impl.run_shield(body, session)

    @router.post("/moderations", summary="Classify texts with a shield, as OpenAI's moderations do.")
    async def moderate(body: ModerationBody, session: Session = None) -> wire.Moderation:
        return await impl.moderate(body, session)

    @router.get("/shields", summary="List the shields of this server.")
    async def shields() -> wire.ShieldList:
        return wire.ShieldList(data=[impl.shield(each) for each in sorted(impl.config.shields)])

    @router.get("/shields/{identifier:path}", summary="Get a shield.")
    async def shield(identifier: str) -> wire.Shield:
        return impl.shield(identifier)

    @router.get(
        "/safety/health", summary="Get whether shields can answer.", openapi_extra={compat.PUBLIC_ROUTE_KEY: True}
    )
    async def health() -> wire.GuardHealth:
        return await impl.service.health()

    return router


def session_of(header: str | None, metadata: wire.Metadata | None) -> str | None:
    """Return the session that a request names.

    Raises:
        InvalidInput: header and body name two.
    """
    named = None if metadata is None else metadata.session_id
    if header is not None and named is not None and header != named:
        raise InvalidInput("metadata.session_id", named, "the same session as in X-Moe-Session")
    return header if header is not None else named


def _violation(verdict: Verdict) -> wire.SafetyViolation | None:
    found = verdict.violation
    if found is None:
        return None
    return wire.SafetyViolation(violation_level=found.level, user_message=found.user_message, metadata=found.metadata)


def _moderation(moderated: Moderated) -> wire.Moderation:
    results = []
    for verdict in moderated.verdicts:
        result = result_of(verdict)
        types = {name: ["text"] for name in result["category_scores"]}
        results.append(wire.ModerationResult(**result, category_applied_input_types=types))
    return wire.Moderation(id=moderated.id, model=moderated.model, results=results)
