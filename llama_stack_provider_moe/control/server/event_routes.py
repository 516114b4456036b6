"""The route for a job's events: a page of them, or a stream until the job has ended."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from llama_stack_provider_moe.control.server import stream, timeline, views, wire
from llama_stack_provider_moe.control.server.event_texts import EventTexts
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore

MAX_EVENTS = 10_000
# The largest offset that `seek` accepts.
Offset = Annotated[int, Field(ge=0, lt=2**63)]
Types = Annotated[
    str | None, Query(description="Types of the events, `a,b`; by default all.", max_length=512, pattern="^[a-z_,]+$")
]


def add_events(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the route to the router of `impl`."""
    texts = EventTexts()

    @router.get(
        "/jobs/{job_uuid}/events",
        summary="Get a page of a training job's events, or follow them.",
        response_model=wire.Events,
        responses={HTTPStatus.OK: {"content": {stream.MEDIA_TYPE: {}}}},
    )
    async def events(
        job_uuid: str,
        cursor: Annotated[Offset, Query(description="Byte to continue from: `cursor` of the previous page.")] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS, description="Largest number of events in the page.")] = 1000,
        types: Types = None,
        follow: Annotated[bool, Query(description="Stream server-sent events until the job has ended.")] = False,
        last_event_id: Annotated[
            Offset | None, Header(description="Byte to continue from, as an EventSource sends it; wins over `cursor`.")
        ] = None,
    ) -> wire.Events | Response:
        wanted = frozenset(filter(None, (types or "").split(",")))
        start = cursor if last_event_id is None else last_event_id

        def page(store: JobStore, whose: str | None) -> wire.Events:
            job = store.get(job_uuid, whose)
            return timeline.page(job.id, views.folder_of(job).events, start, limit, wanted)

        if not follow:
            return await impl.seen(page)
        look = await impl.seen(lambda store, whose: _look(store, whose, job_uuid, texts, wanted))
        found = impl.followers.output(look, start)
        return StreamingResponse(found, media_type=stream.MEDIA_TYPE, headers=stream.HEADERS)


class _Look:
    """Looks at a job's new events.

    Args:
        store: the store.
        whose: the owner whose jobs the caller may read; None for every owner's.
        job_uuid: the job.
        texts: the texts of events, for all followers.
        types: types of the events; none: any.
    """

    def __init__(
        self, store: JobStore, whose: str | None, job_uuid: str, texts: EventTexts, types: frozenset[str]
    ) -> None:
        self._store = store
        self._whose = whose
        self._job_uuid = job_uuid
        self._texts = texts
        self._types = types

    def __call__(self, start: int | None) -> stream.OutputPage:
        """Return the state and the events from a byte on; the state first, so that no event is missed."""
        job = self._store.get(self._job_uuid, self._whose)
        page = self._texts.page(views.folder_of(job).events, start or 0, self._types)
        return stream.OutputPage(job.state.over, job.state.value, job.id, page.text, page.position)


def _look(store: JobStore, whose: str | None, job_uuid: str, texts: EventTexts, types: frozenset[str]) -> _Look:
    views.folder_of(store.get(job_uuid, whose))  # refuse before the stream begins
    return _Look(store, whose, job_uuid, texts, types)
