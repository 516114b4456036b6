"""Find the events of one type in a long file without parsing the others."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llama_stack_provider_moe.jobdir.events import LINE_LIMIT_BYTES, Assessed, Evaluation, Saved
from llama_stack_provider_moe.jobdir.folder import Artifact, JobFolder


def scan[E: (Evaluation, Assessed, Saved)](
    path: Path, kind: type[E], start: int = 0, limit_bytes: int | None = None
) -> Iterator[E]:
    """Yield the events of type `kind`, oldest first; nothing if the file is missing.

    Args:
        path: An events file.
        kind: Class of the events.
        start: Byte to start at; an incomplete first line is ignored.
        limit_bytes: Read about this many bytes at most; None reads to the end.
    """
    # pydantic writes no space here, and inside a text the quotes would be escaped.
    needle = f'"type":"{kind.model_fields["type"].default}"'.encode()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        left = limit_bytes if limit_bytes is not None else path.stat().st_size
        while left > 0 and (line := file.readline(LINE_LIMIT_BYTES)):
            left -= len(line)
            if needle in line:
                try:
                    event = kind.model_validate_json(line)
                except ValueError:  # an incomplete line, or a text that quotes an event
                    continue
                yield event


def evaluations_from(path: Path, cursor: int, limit_bytes: int = 16 << 20) -> tuple[list[Evaluation], int]:
    """Return the evaluations in whole lines from byte `cursor` on, and the cursor of the next call.

    Args:
        path: An events file; a missing file has none.
        cursor: Byte to start at.
        limit_bytes: Read this many bytes at most. A longer line without an end is damage, and is passed over.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], cursor
    with file:
        file.seek(cursor)
        content = file.read(limit_bytes)
    end = content.rfind(b"\n") + 1
    if not end and len(content) == limit_bytes:
        end = limit_bytes
    found = []
    for line in content[:end].splitlines():
        if b'"type":"evaluation"' in line:
            with suppress(ValueError):  # a text that quotes an event, or a line that a full disk cut
                found.append(Evaluation.model_validate_json(line))
    return found, cursor + end


def saved_artifacts(folder: JobFolder) -> tuple[Artifact, ...]:
    """Return the artifacts that a job has saved and that still exist, oldest first; each name only once."""
    found = {}
    for event in scan(folder.events, Saved):
        try:
            artifact = Artifact.model_validate(event.artifact, extra="ignore")
        except ValueError:  # the process died while it wrote the event
            continue
        if Path(artifact.path).is_dir():  # old checkpoints may have been pruned
            found[artifact.identifier] = artifact
    return tuple(found.values())
