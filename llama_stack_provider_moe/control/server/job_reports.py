"""The route for a job's report: one HTML file for people who were not there, the same as `moe-train report job`.

It is made when it is asked for, from the same documents that a client would get, so that it needs no torch and no file.
"""

import json
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from llama_stack_provider_moe.control.dashboard import report
from llama_stack_provider_moe.control.server import callers, files, job_status, routing_series, timeline, views
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import InvalidFile, NotFound
from llama_stack_provider_moe.ground.small_files import read_object

# A browser saves it under this name rather than showing it as a page of this server.
HEADERS = {
    "Content-Disposition": 'attachment; filename="report.html"',
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
}


def add_reports(router: APIRouter, impl: PostTrainingService) -> None:
    """Add the route to the router of `impl`."""

    @router.get(
        "/jobs/{job_uuid}/report",
        summary="Download a job's report: one HTML file with figures, curves, experts, evaluation and settings.",
        response_class=HTMLResponse,
    )
    async def job_report(job_uuid: str) -> Response:
        sources = await impl.seen(partial(sources_of, job_id=job_uuid))
        text = await impl.guard.in_state_dir(report.render, sources)
        impl.audit.note(callers.owner(), "download", job=job_uuid, artifact="report", file="report.html")
        return HTMLResponse(text, headers=HEADERS)


def sources_of(store: JobStore, whose: str | None, job_id: str) -> report.Sources:
    """Return what the report of a job is made of.

    Args:
        store: the store.
        whose: the owner whose jobs the caller may read; None for every owner's.
        job_id: the job.

    Raises:
        NotFound: the caller has no such job.
    """
    job = store.get(job_id, whose)
    events = views.folder_of(job).events
    shown: dict[str, dict[str, Any]] = {}
    for name, path in report.SHOWN.items():
        # Without such an artifact, or before it has measured anything.
        with suppress(NotFound, FileNotFoundError, InvalidFile):
            shown[name] = read_object(files.file(job, store, name, path).path, report.SHOWN_BYTES)
    return report.Sources(
        _document(job_status.detail(job, store)),
        _document(timeline.metrics(job.id, events, None, None, report.POINTS)),
        _document(routing_series.series(job.id, events, None, report.COLUMNS)),
        shown,
    )


def _document(found: BaseModel) -> dict[str, Any]:
    """What a client gets."""
    document: dict[str, Any] = json.loads(found.model_dump_json())
    return document
