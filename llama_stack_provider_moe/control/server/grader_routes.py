"""The routes that try graders, ours and OpenAI's.

POST graders/validate                       checks a grader
POST graders/run                            runs one on an answer
POST /v1/fine_tuning/alpha/graders/...      the same
"""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Body, Request
from pydantic import WrapValidator

from llama_stack_provider_moe.control.server import wire_graders
from llama_stack_provider_moe.control.server.service import PostTrainingService

if TYPE_CHECKING:
    ValidateBody = object
    RunBody = object
else:  # a thread validates it; the document has the real type
    _AS_IT_CAME = WrapValidator(lambda body, _: body)
    ValidateBody = Annotated[wire_graders.ValidateGraderRequest, _AS_IT_CAME, Body()]
    RunBody = Annotated[wire_graders.RunGraderRequest, _AS_IT_CAME, Body()]


def add_graders(router: APIRouter, impl: PostTrainingService, below: str = "") -> None:
    """Add the routes to a router of `impl`.

    Args:
        router: ours, or OpenAI's.
        impl: the service.
        below: what stands before `graders` in their paths.
    """

    @router.post(f"{below}/graders/validate", summary="Check a grader.")
    async def validate(body: ValidateBody, request: Request) -> wire_graders.ValidatedGrader:
        return await impl.graders.validate(body, len(await request.body()))

    @router.post(f"{below}/graders/run", summary="Run a grader on an answer.")
    async def run(body: RunBody, request: Request) -> wire_graders.GraderRun:
        return await impl.graders.run(body, len(await request.body()))
