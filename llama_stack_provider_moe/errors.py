"""Every error this package raises on purpose, drawn as a tree.

    MoeError                      500  never raised itself
    ├── InvalidInput              400  a field, its value, what would be right
    │   ├── InvalidBody           400  a request's body: each problem with it
    │   └── InvalidRows           400  rows of a data set: number, field, reason
    ├── Forbidden                 403  known, but not allowed to this caller or on this server
    ├── NotFound                  404  no such job, data set, artifact or model
    ├── Conflict                  409  the job's state, or its name, does not allow it
    ├── NoRoom                    507  the server's disk is full
    ├── NotOffered                501  part of the API that this provider does not implement
    ├── NoToolchain               501  llama.cpp, which GGUF files need, is not on this machine
    ├── ServerRefused                  raised by the command line: a server's own refusal
    ├── ServerLost                     raised by the command line: no server, or one that stopped answering
    └── TrainingError             500  raised in the training process; ends a job as `failed`
        ├── ModelError                 the model can't be loaded, or is not one we train
        ├── LayoutError                a Mixture-of-Experts model whose parts were not all found
        ├── AdapterError               an adapter was asked for somewhere it can't go
        ├── DataError                  rows are well-formed, but can't be trained on as asked
        ├── CheckpointError            a checkpoint is missing, incomplete or of another job
        └── ExportError                what was trained could not be exported, or a file does not do as the model does

`status` is the HTTP code a host answers with; `host.routes` reads it and nothing else.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class MoeError(Exception):
    """Base of the tree; its text is written for the person who sent the request."""

    status: ClassVar[int] = 500


class InvalidInput(MoeError, ValueError):
    """A value that can't be used.

    Args:
        field: dotted path of the field, as the caller wrote it (`training.lr`).
        value: what was given.
        expected: the range or the list that would have been right.
    """

    status = 400

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected
        super().__init__(f"{field}: {shorten(value)} is not valid; expected {expected}")


class InvalidBody(InvalidInput):
    """A request's body with one or more problems, each a sentence that names its field."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        ValueError.__init__(self, "; ".join(problems))


class RowProblem(NamedTuple):
    """One thing wrong with one row; `row` counts from 1, as an editor counts lines."""

    row: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.field}: {self.reason}"


class InvalidRows(InvalidInput):
    """Rows that can't be trained on: the first `SHOWN` are named, all of them are counted."""

    SHOWN: ClassVar[int] = 20

    def __init__(self, dataset_id: str, problems: Sequence[RowProblem], count: int, total_rows: int) -> None:
        self.dataset_id = dataset_id
        self.problems = tuple(problems[: self.SHOWN])
        self.count = count
        self.total_rows = total_rows
        shown = "; ".join(str(problem) for problem in self.problems)
        more = "" if count <= len(self.problems) else f"; and {count - len(self.problems)} more"
        ValueError.__init__(self, f"dataset {dataset_id!r}: {count} problem(s) in {total_rows} row(s): {shown}{more}")


class Forbidden(MoeError):
    """The caller, or this server's configuration, does not allow it."""

    status = 403


class NotFound(MoeError):
    """No such job, data set, artifact or model."""

    status = 404


class Conflict(MoeError):
    """The state of a job, or a name already taken, does not allow it."""

    status = 409


class NoRoom(MoeError):
    """The server's disk is full; nothing was taken in."""

    status = 507


class NotOffered(MoeError):
    """Part of the API that this provider does not implement."""

    status = 501


class NoToolchain(MoeError):
    """llama.cpp's converter or library is not on this machine; the text names the command that installs it."""

    status = 501


class ServerRefused(MoeError):
    """A server answered the command line, and not with what was asked for.

    Args:
        message: the server's own, whole.
        answered: its HTTP status.
    """

    def __init__(self, message: str, answered: int) -> None:
        self.answered = answered
        super().__init__(message)


class ServerLost(MoeError):
    """No server answers the command line, or it stopped before its answer was whole.

    Args:
        message: which server, and what happened.
        asked: whether the request may have reached it.
    """

    def __init__(self, message: str, asked: bool) -> None:
        self.asked = asked
        super().__init__(message)


class TrainingError(MoeError):
    """Raised in the training process; its text becomes the reason of a failed job."""


class ModelError(TrainingError):
    """The model can't be loaded, or is not one we train."""


class LayoutError(TrainingError):
    """A Mixture-of-Experts model whose parts were not all found where its family keeps them."""


class AdapterError(TrainingError):
    """An adapter was asked for somewhere it can't go, or reached nothing."""


class DataError(TrainingError):
    """Rows are well-formed, but can't be trained on as asked."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, incomplete or of another job."""


class ExportError(TrainingError):
    """What was trained could not be exported as asked, or an exported file does not do what the model does."""


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)`, cut at `limit` characters, so that an error never carries a whole data set."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
