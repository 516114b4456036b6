"""`attempt.json` in a job's folder: which attempt (start) of the job counts. Superseded processes end themselves.

The supervisor writes the file in the transaction that records the process, so it is never written too late. Training
processes never open the store. They compare the file with their environment before each write to the folder and at each
step.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

ATTEMPT_FILE = "attempt.json"
JOB_VARIABLE = "MOE_JOB_FOLDER"
ATTEMPT_VARIABLE = "MOE_JOB_ATTEMPT"
SUPERSEDED = 4  # exit code


class Attempt(BaseModel):
    """The attempt of a job that counts."""

    number: int
    name: str


def attempt_name(number: int, started_at: datetime | None) -> str:
    """Return a name that is unique among all attempts, even those of a later job with the same id."""
    return f"{number}@{'' if started_at is None else started_at.isoformat()}"


def read_attempt(root: Path) -> Attempt | None:
    """Return the attempt that counts in a job's folder; None before the first attempt, or if the folder is gone.

    Raises:
        OSError, ValidationError: The file can't be read.
    """
    try:
        return Attempt.model_validate_json((root / ATTEMPT_FILE).read_bytes())
    except FileNotFoundError:
        return None


def require_current() -> None:
    """End this process at once if it is a training process whose attempt was superseded; otherwise do nothing.

    It raises no exception, because a library could catch it, and a `finally` block could still write.
    """
    root, mine = os.environ.get(JOB_VARIABLE), os.environ.get(ATTEMPT_VARIABLE)
    if root is None or mine is None:  # started by hand, or by an earlier version's supervisor
        return
    try:
        counts = read_attempt(Path(root))
    except (OSError, ValidationError):  # perhaps a short failure of a file server: check again before the next write
        return
    if counts is not None and counts.name == mine:
        return
    now = "the job's folder is gone" if counts is None else f"attempt {counts.number} replaced it"
    message = f"this is attempt {mine.partition('@')[0]} of the job and no longer counts: {now}; the process ends now\n"
    try:
        sys.stderr.write(message)
        sys.stderr.flush()
    finally:
        os._exit(SUPERSEDED)
