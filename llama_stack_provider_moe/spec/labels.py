"""Labels and notes of jobs: what owners write about a job to find it again. They can be changed at any time.

They are not part of a job's `spec.json`, which says for ever what was asked for: the store has them.
"""

from typing import Annotated

from pydantic import Field

from llama_stack_provider_moe.spec.blocks import Block

MAX_LABELS = 32
MAX_VALUE = 256
MAX_NOTE = 4000
# As Kubernetes names its labels, so that `key=value` and `key-` on a command line can be told apart.
LABEL_KEY_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"
# Any text on one line. A null character can't be stored in every database.
_LINE_PATTERN = r"^[^\x00-\x1f\x7f]*$"
_TEXT_PATTERN = r"^[^\x00]*$"

LabelKey = Annotated[str, Field(pattern=LABEL_KEY_PATTERN)]
LabelValue = Annotated[str, Field(max_length=MAX_VALUE, pattern=_LINE_PATTERN)]
Labels = dict[LabelKey, LabelValue]
Note = Annotated[str, Field(max_length=MAX_NOTE, pattern=_TEXT_PATTERN)]


class Labelled(Block):
    """The fields that are not in a job's `spec.json`."""

    labels: Labels = Field(
        default_factory=dict,
        max_length=MAX_LABELS,
        exclude=True,
        description="Labels to find the job by, each a key and a text of at most 256 characters; they can be changed "
        "later (`moe-train label`).",
    )
    note: Note | None = Field(
        default=None, exclude=True, description="Your own words about the job; they can be changed later."
    )
