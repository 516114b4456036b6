"""A file as an answer: streamed, with ranges, and with what a reader checks and resumes it by."""

import base64
import re
from http import HTTPStatus

from fastapi import HTTPException
from fastapi.responses import FileResponse

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.host.files import File

_RANGE = re.compile(r"bytes=(?:(?P<first>\d{1,18})-(?P<last>\d{1,18})?|-(?P<suffix>\d{1,18}))", re.ASCII)


def download(file: File, wanted: str | None, unless_changed: str | None) -> FileResponse:
    """The file, or the part of it that the header `Range` asks for.

    Args:
        file: what to send.
        wanted: the header `Range`.
        unless_changed: the header `If-Range`.

    Raises:
        InvalidInput: `Range` is not one range of bytes.
        HTTPException: 416, it begins beyond the end.
    """
    digest = base64.b64encode(bytes.fromhex(file.sha256)).decode()
    response = FileResponse(
        file.path, stat_result=file.stat, filename=file.path.name, media_type="application/octet-stream",
        headers={
            "ETag": f'"{file.sha256}"', "Repr-Digest": f"sha-256=:{digest}:", "X-Checksum-Sha256": file.sha256,
            "X-Content-Type-Options": "nosniff",
        },
    )  # fmt: skip
    changed = unless_changed is not None and unless_changed not in (
        response.headers["etag"],
        response.headers["last-modified"],
    )
    if wanted is not None and not changed:  # otherwise the whole file is sent
        _check(wanted, file.stat.st_size)
    return response


def _check(wanted: str, size: int) -> None:
    """Starlette's own refusals have another shape than ours."""
    found = _RANGE.fullmatch(wanted.strip())
    if found is None or (found["last"] and int(found["last"]) < int(found["first"])):
        raise InvalidInput("Range", wanted, "one range: bytes=FIRST-LAST, bytes=FIRST- or bytes=-COUNT")
    begins_inside = int(found["first"]) < size if found["first"] else size > 0 < int(found["suffix"])
    if not begins_inside:
        raise HTTPException(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"Range: {wanted} is beyond the {size} bytes of the file",
            headers={"Content-Range": f"bytes */{size}"},
        )  # fmt: skip
