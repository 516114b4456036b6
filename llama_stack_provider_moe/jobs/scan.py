"""Events of one type out of a long file, without parsing the others."""

from collections.abc import Iterator
from pathlib import Path

from llama_stack_provider_moe.jobs.events import LINE_LIMIT_BYTES, Assessed, Evaluation, Saved
from llama_stack_provider_moe.jobs.folder import Artifact, JobFolder


def scan[E: (Evaluation, Assessed, Saved)](
    path: Path, kind: type[E], start: int = 0, limit_bytes: int | None = None
) -> Iterator[E]:
    """The events of type `kind`, oldest first; none where the file is missing.

    Args:
        path: an events file.
        kind: the event's class.
        start: byte to begin at; a line cut by it is no event.
        limit_bytes: read no more than about this; None: to the end.
    """
    # Written by pydantic, which puts no space here; inside a text the quotes would be escaped.
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
                except ValueError:  # half a line, or a text that quotes an event
                    continue
                yield event


def saved_artifacts(folder: JobFolder) -> tuple[Artifact, ...]:
    """What a job has saved so far and is still there, oldest first; a name that was saved twice counts once."""
    found = {}
    for event in scan(folder.events, Saved):
        try:
            artifact = Artifact.model_validate(event.artifact)
        except ValueError:  # written by a process that did not get to the end of it, or by another version
            continue
        if Path(artifact.path).is_dir():  # older checkpoints may have been pruned since
            found[artifact.identifier] = artifact
    return tuple(found.values())
