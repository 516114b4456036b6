"""The result file of a job, and what else is counted over all its steps."""

import csv
import io
from functools import lru_cache
from pathlib import Path

from llama_stack_provider_moe.control.server import timeline, views, wire
from llama_stack_provider_moe.control.server.openai import ids
from llama_stack_provider_moe.control.server.openai.objects import ResultFile
from llama_stack_provider_moe.control.store.store import Job
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.jobdir.state import JobState

MOST_ROWS = 100_000  # the steps of a longer job are thinned evenly
FILENAME = "step_metrics.csv"


def result_files(job: Job) -> list[str]:
    """Return the ids of the files with a job's figures: one, once the job has succeeded."""
    return [ids.of_file(job.id)] if job.state is JobState.COMPLETED else []


def described(job: Job) -> ResultFile:
    """Return the description of a job's result file.

    Raises:
        NotFound: the job has not succeeded.
    """
    ended_at = job.ended_at or job.scheduled_at
    return ResultFile(
        id=ids.of_file(job.id), bytes=len(content(job)), created_at=int(ended_at.timestamp()), filename=FILENAME
    )


def content(job: Job) -> bytes:
    """Return a job's result file: CSV, a line for each step, with `train_loss`, `valid_loss` and all other figures.

    Raises:
        NotFound: the job has not succeeded.
    """
    if job.state is not JobState.COMPLETED:
        raise NotFound(f"job {job.id!r} is {job.state.value}, and has its result file once it has succeeded")
    found = timeline.metrics(job.id, views.folder_of(job).events, None, None, MOST_ROWS)
    rows: dict[int, dict[str, object]] = {}
    for index, step in enumerate(found.steps):
        figures = {_train(name): values[index] for name, values in found.metrics.items()}
        rows[step] = {"step": step, "epoch": found.epoch[index], **figures}
    for point in found.evaluations:
        rows.setdefault(point.step, {"step": point.step, "epoch": point.epoch}).update(_held_out(point))
    named = (name for row in rows.values() for name in row)
    columns = dict.fromkeys(["step", "epoch", "train_loss", "valid_loss", *named])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue().encode("utf-8", "backslashreplace")


_TRAIN = {"loss": "train_loss", "reward": "train_reward_mean"}
_HELD_OUT = {"reward": "reward_mean"}


def _train(name: str) -> str:
    return _TRAIN.get(name, name)


def _held_out(point: wire.EvaluationPoint) -> dict[str, object]:
    return {
        f"valid_{_HELD_OUT.get(name, name.removeprefix('validation_'))}": value for name, value in point.metrics.items()
    }


def trained_tokens(job: Job) -> int | None:
    """Return the number of tokens of a job's steps, padding left out; None for a job whose steps don't have it."""
    path = views.folder_of(job).events
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _tokens(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _tokens(path: Path, size: int, mtime_ns: int) -> int | None:
    """The sum of the steps' `tokens`, computed once for each version of the file; size and time identify it."""
    found = timeline.total(path, "tokens")
    return None if found is None else round(found)
