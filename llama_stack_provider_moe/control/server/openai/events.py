"""A job's events in OpenAI's form, newest first, read backwards from the end of the file.

An event's id has the byte at which its line begins, so a page costs the same at any place of a long file.
"""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_stack_provider_moe.control.server import serving, views
from llama_stack_provider_moe.control.server.openai import ids
from llama_stack_provider_moe.control.server.openai.objects import FineTuningEvent, FineTuningEvents
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.small_files import open_regular
from llama_stack_provider_moe.jobdir.events import (
    LINE_LIMIT_BYTES,
    Cancelled,
    Evaluation,
    Failed,
    Finished,
    Message,
    Progress,
    Resumed,
    Saved,
    Started,
    Step,
    parse,
)

BLOCK_BYTES = 1 << 16
SERVED = f"{ids.EVENT}served"  # the newest event of a job whose serving has ended, which its file does not have either
CREATED = f"{ids.EVENT}created"  # the oldest event of every job, which its file does not have
_OF_GRADER = re.compile(r"rewards/(.+)/mean")
_AT_BYTE = re.compile(rf"{ids.EVENT}(\d{{1,18}})")
# Large events that this API has no form for; they are not even parsed.
_SKIPPED = (b'"type":"routing"', b'"type":"plan"')


class Line(NamedTuple):
    """A complete line of a file, with its end."""

    offset: int
    content: bytes


def page(job: Job, served: serving.Served | None, limit: int, after: str | None) -> FineTuningEvents:
    """Return events of a job, newest first.

    Args:
        job: the job.
        served: how far its serving is.
        limit: largest number of events.
        after: id of the last event of the previous page; None for the first page.

    Raises:
        InvalidInput: `after` is not the id of an event.
    """
    if after == CREATED:
        return FineTuningEvents(data=[], has_more=False)
    found = [_served(served)] if after is None and served is not None and served.at is not None else []
    for line in backwards(views.folder_of(job).events, None if after in (None, SERVED) else _byte_of(after)):
        event = _event(line)
        if event is not None:
            found.append(event)
        if len(found) > limit:
            return FineTuningEvents(data=found[:limit], has_more=True)
    found.append(_created(job))
    return FineTuningEvents(data=found[:limit], has_more=len(found) > limit)


def backwards(path: Path, end: int | None = None) -> Iterator[Line]:
    """Yield the complete lines of a file before byte `end`, the last one first; nothing if the file is missing.

    What follows the last newline is still being written and is left out. So is a line longer than any event.

    Args:
        path: the file.
        end: a byte; None for the end of the file.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        size = file.seek(0, 2)
        position = size if end is None else min(end, size)
        rest, is_cut = b"", True  # `rest` begins at `position`; it ends with a newline unless `is_cut`
        while position > 0:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            rest, position = file.read(position - start) + rest, start
            if is_cut:
                rest = rest[: rest.rfind(b"\n") + 1]
                is_cut = not rest
            stop = len(rest)
            while stop and (begin := rest.rfind(b"\n", 0, stop - 1) + 1 or (0 if position == 0 else -1)) >= 0:
                yield Line(position + begin, rest[begin:stop])
                stop = begin
            rest = rest[:stop]
            if len(rest) > LINE_LIMIT_BYTES:
                rest, is_cut = b"", True


def _byte_of(after: str) -> int:
    found = _AT_BYTE.fullmatch(after)
    if found is None:
        raise InvalidInput("after", after, "the id of an event of this job")
    return int(found[1])


def _served(served: serving.Served) -> FineTuningEvent:
    at = 0 if served.at is None else int(served.at.timestamp())
    if served.state == "served":
        return FineTuningEvent(id=SERVED, created_at=at, message=f"The model is served as {served.model}")
    why = f"The model is not served, so `fine_tuned_model` is the name of the job: {served.why}"
    return FineTuningEvent(id=SERVED, created_at=at, level="warn", message=why)


def _created(job: Job) -> FineTuningEvent:
    return FineTuningEvent(
        id=CREATED,
        created_at=int(job.scheduled_at.timestamp()),
        message=f"Created fine-tuning job: {ids.of_job(job.id)}",
    )


def _event(line: Line) -> FineTuningEvent | None:
    if any(kind in line.content for kind in _SKIPPED):
        return None
    try:
        event = parse(line.content)
    except ValueError:  # such as a line that a full disk cut short
        return None
    told = _told(event)
    if told is None:
        return None
    at: datetime = event.time
    return FineTuningEvent(id=f"{ids.EVENT}{line.offset}", created_at=int(at.timestamp()), **told)


def _told(event: Any) -> dict[str, Any] | None:
    match event:
        case Started():
            return {"message": "The training process has started"}
        case Progress(done=0):
            return {"message": f"Stage: {event.stage}"}
        case Resumed():
            return {"message": f"Training resumes after step {event.step}"}
        case Step():
            figures = _figures(event)
            data = {"step": event.step, "total_steps": event.max_steps, "train_loss": figures.get("loss"), **figures}
            loss = event.metrics.get("loss")
            shown = "" if loss is None else f": training loss={loss:.4g}"
            if "reward" in event.metrics:  # the loss of a policy says nothing
                data |= _rewards("train", figures)
                shown = f", train mean reward={event.metrics['reward']:.4g}"
            return {"message": f"Step {event.step}/{event.max_steps}{shown}", "type": "metrics", "data": data}
        case Evaluation():
            figures = _figures(event)
            data = {"step": event.step, "full_valid_loss": figures.get("validation_loss"), **figures}
            if "reward" in figures:
                data |= _rewards("valid", figures)
            shown = ", ".join(f"{name}={value:.4g}" for name, value in sorted(event.metrics.items()))
            return {"message": f"Held out after step {event.step}: {shown}", "type": "metrics", "data": data}
        case Saved():
            return {"message": f"Saved {event.artifact.get('kind')} {event.artifact.get('identifier')}"}
        case Message():
            return {"message": event.text, "level": "info" if event.level == "info" else "warn"}
        case Failed():
            return {"message": f"The job failed: {event.reason}", "level": "error"}
        case Cancelled():
            return {"message": f"The job stopped after step {event.step}; it can be resumed"}
        case Finished():
            return {"message": "Training has finished"}
        case _:
            return None


def _rewards(part: Literal["train", "valid"], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The rewards by OpenAI's names: in `scores` by grader too, and at the top the older name of the mean."""
    name = f"{part}_reward_mean"
    graders = [
        {"name": found[1], name: value}
        for key, value in figures.items()
        if (found := _OF_GRADER.fullmatch(key)) is not None
    ]
    older = "train_mean_reward" if part == "train" else "full_valid_mean_reward"
    mean = figures["reward"]
    return {name: mean, older: mean, "scores": {name: mean, "graders": graders}}


def _figures(event: Step | Evaluation) -> dict[str, Any]:
    """The metrics; NaN and infinity become text, because JSON lacks them."""
    figures: dict[str, Any] = json.loads(event.model_dump_json(include={"metrics"}), parse_constant=str)["metrics"]
    return figures
