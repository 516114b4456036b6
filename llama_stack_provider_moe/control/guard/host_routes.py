"""The routes of Llama Stack's safety and shields APIs, in place of the host's own, with the same bodies and answers.

The host's routes parse a body on the event loop. Where a route of 0.6.1 raises, its logger renders a traceback for some
three seconds on the event loop, and the connection is dropped after the answer: an empty list of messages would stop
the server for everybody. Here errors are answered as on the routes of this package, bodies are bounded and read in
threads, and `X-Moe-Session` names a session. A shield of another provider is run by the host as before; one of ours
without the host's span, which would hold the conversation.
"""

from importlib import import_module
from typing import Annotated, Any

from fastapi import APIRouter, Body
from pydantic import BaseModel, ValidationError

from llama_stack_provider_moe.control.guard import host, wire
from llama_stack_provider_moe.control.guard.llama_stack import SafetyProvider
from llama_stack_provider_moe.control.guard.routes import REFUSALS, Session, session_of
from llama_stack_provider_moe.control.guard.service import GuardService
from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.answers import answers_of
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.validation_errors import invalid_body

AnyBody = Annotated[Any, Body()]


def install(service: GuardService) -> None:
    """Replace the host's routers; hosts build them after the providers.

    The registry is a private dict of frozen releases (llama-stack 0.6.1 and 0.7.3), which our extras pin.
    """
    registry = import_module(f"{compat.HOST}.core.server.fastapi_router_registry")
    registry._ROUTER_FACTORIES["safety"] = lambda impl: safety_router(impl, service)
    registry._ROUTER_FACTORIES["shields"] = lambda impl: shields_router(impl, service)


def safety_router(impl: Any, service: GuardService) -> APIRouter:
    """Return the routes of the safety API.

    Args:
        impl: the host's router of the API, which finds a shield's provider.
        service: has the limits of bodies, and the threads.
    """
    types = host.models()
    router = APIRouter(prefix="/v1", tags=["Safety"], route_class=answers_of(service), responses=REFUSALS)

    @router.post("/safety/run-shield", summary="Run a shield on messages.", response_model=types.RunShieldResponse)
    async def run_shield(body: AnyBody, session: Session = None) -> Any:
        request = await _read(service, types.RunShieldRequest, body)
        with host.session(_session(session, body)):
            provider = await impl.routing_table.get_provider_impl(request.shield_id)
            return await (provider if isinstance(provider, SafetyProvider) else impl).run_shield(request)

    @router.post("/moderations", summary="Classify texts with a shield.", response_model=types.ModerationObject)
    async def run_moderation(body: AnyBody, session: Session = None) -> Any:
        request = await _read(service, types.RunModerationRequest, body)
        with host.session(_session(session, body)):
            return await impl.run_moderation(request)

    @router.get(
        "/safety/health", summary="Get whether shields can answer.", openapi_extra={compat.PUBLIC_ROUTE_KEY: True}
    )
    async def health() -> wire.GuardHealth:
        return await service.health()

    return router


def shields_router(impl: Any, service: GuardService) -> APIRouter:
    """Return the routes of the shields API, the host's registry of shields.

    Args:
        impl: the registry.
        service: has the limits of bodies, and the threads.
    """
    types = host.models()
    router = APIRouter(prefix="/v1", tags=["Shields"], route_class=answers_of(service), responses=REFUSALS)

    @router.get("/shields", summary="List all shields.", response_model=types.ListShieldsResponse)
    async def list_shields() -> Any:
        return await impl.list_shields()

    @router.get("/shields/{identifier:path}", summary="Get a shield.", response_model=types.Shield)
    async def get_shield(identifier: str) -> Any:
        return await impl.get_shield(types.GetShieldRequest(identifier=identifier))

    @router.post("/shields", summary="Register a shield.", response_model=types.Shield)
    async def register_shield(body: AnyBody) -> Any:
        return await impl.register_shield(await _read(service, types.RegisterShieldRequest, body))

    @router.delete("/shields/{identifier:path}", summary="Unregister a shield.")
    async def unregister_shield(identifier: str) -> None:
        await impl.unregister_shield(types.UnregisterShieldRequest(identifier=identifier))

    return router


async def _read(service: GuardService, model: type[BaseModel], body: object) -> Any:
    """Return a body as the host's model, which a thread makes of it."""
    return await service.guard.bodies.run(0, _validated, model, body)


def _session(header: str | None, body: Any) -> str | None:
    """The session that a request names; the host's models have no metadata."""
    given = body.get("metadata")
    return session_of(header, None if given is None else _metadata(given))


def _metadata(given: object) -> wire.Metadata:
    if not isinstance(given, dict):
        raise InvalidInput("metadata", given, "an object")
    try:
        return wire.Metadata.model_validate(given)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), wire.Metadata, lambda path: f"metadata.{path}") from None


def _validated(model: type[BaseModel], body: object) -> BaseModel:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False), model) from None
