"""The routes for a playground's prompts.

POST   jobs/{id}/prompts        sends a prompt
GET    jobs/{id}/prompts        the playground, and its prompts
GET    jobs/{id}/prompts/{n}    the answer so far, or a stream of it
DELETE jobs/{id}/prompts/{n}    stops the answer
"""

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import callers, playgrounds, stream, wire_playground
from llama_stack_provider_moe.control.server.event_routes import Offset
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.spec.playground import PromptRequest
from llama_stack_provider_moe.spec.validation_errors import validated

if TYPE_CHECKING:
    PromptBody = object
else:  # a thread validates it; the document has the real type
    PromptBody = Annotated[PromptRequest, WrapValidator(lambda body, _: body), Body()]
Number = Annotated[int, Path(ge=1, lt=10**9, description="Number of the prompt.")]


def add_playground(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the routes to the router of `impl`."""
    privacy = impl.config.privacy

    @router.post("/jobs/{job_uuid}/prompts", summary="Send a prompt to a playground.")
    async def send(job_uuid: str, request: Request, body: PromptBody | None = None) -> wire_playground.SentPrompt:
        # Access is checked first, so that errors of the body reveal nothing to others.
        await impl.changed(lambda store, whose: store.get(job_uuid, whose))
        asked = await impl.guard.bodies.run(len(await request.body()), validated, PromptRequest, body)
        await impl.guard.must_have_room("the prompt was not accepted")
        found = await impl.changed(lambda store, whose: playgrounds.send(store.get(job_uuid, whose), asked, privacy))
        impl.audit.note(callers.owner(), "prompt", job=job_uuid, number=found.number)
        return found

    @router.get("/jobs/{job_uuid}/prompts", summary="Get a playground and its prompts.")
    async def standing(job_uuid: str) -> wire_playground.Playground:
        return await impl.seen(lambda store, whose: playgrounds.standing(store.get(job_uuid, whose)))

    @router.get(
        "/jobs/{job_uuid}/prompts/{number}",
        summary="Get the answer to a prompt so far, or follow it.",
        response_model=wire_playground.PromptAnswer,
        responses={HTTPStatus.OK: {"content": {stream.MEDIA_TYPE: {}}}},
    )
    async def answer(
        job_uuid: str,
        number: Number,
        follow: Annotated[bool, Query(description="Stream server-sent events until the answer has ended.")] = False,
        last_event_id: Annotated[
            Offset | None, Header(description="With `follow`: the `id` of the last event received.")
        ] = None,
    ) -> wire_playground.PromptAnswer | Response:
        if not follow:
            return await impl.seen(lambda store, whose: playgrounds.answer(store.get(job_uuid, whose), number))

        def looker(store: JobStore, whose: str | None) -> stream.Look:
            playgrounds.answer(store.get(job_uuid, whose), number)  # refuse before the stream begins
            return lambda start: playgrounds.page(store.get(job_uuid, whose), number, start or 0)

        look = await impl.seen(looker)
        pieces = impl.followers.output(look, last_event_id or 0, stream.TOKEN_POLL_S)
        return StreamingResponse(pieces, media_type=stream.MEDIA_TYPE, headers=stream.HEADERS)

    @router.delete("/jobs/{job_uuid}/prompts/{number}", summary="Stop the answer to a prompt, or withdraw the prompt.")
    async def stop(job_uuid: str, number: Number) -> wire_playground.StoppedPrompt:
        return await impl.changed(lambda store, whose: playgrounds.stop(store.get(job_uuid, whose), number, privacy))
