"""`later.json`: a job that waits for other jobs, as it was before its names were resolved.

The names of jobs that have not completed stand for files that don't exist yet. Once these jobs have completed, the
names are resolved from this file, with the same checks as at the submission, and `spec.json` is written again. The file
stays, so that this can be repeated if a process dies meanwhile.
"""

from typing import Any

from pydantic import BaseModel, Field

LATER_FILE = "later.json"


class Later(BaseModel):
    """What the resolution of a job's names needs."""

    spec: dict[str, Any] = Field(description="The complete job, with the defaults of the server that accepted it.")
    body: Any = Field(description="What the caller stated.")
    names: dict[str, str] = Field(description="The caller's names of fields, by their names in the job.")
    whose: str | None = Field(description="The owner whose jobs the job may name; null: every owner's.")
